// The CPU backend's launchers: they pick the kernels of the instruction set in use and share the work over the thread
// pool.
#pragma once
#include <cstdint>

#include "params.h"

namespace medusa::cpu {

void tree_attention(const TreeAttentionParams&);
void rotary_append(const RotaryAppendParams&);
void rms_norm(const RmsNormParams&);
void silu_mul(const SiluMulParams&);
void linear(const LinearParams&);
void draft_heads(const DraftHeadsParams&);
void verify_tree(const VerifyTreeParams&);
void verify_lm_head(const VerifyLmHeadParams&);
void compact_kv(const CompactKvParams&);

// Bytes of `matrices` packed matrices that lie one behind the other; each begins on a 64-byte boundary.
int64_t packed_bytes(int matrices, int out_features, int in_features, WeightFormat);
void pack(const void* weight, void* packed, int matrices, int out_features, int in_features, DType, WeightFormat);

const char* isa();                 // "avx512", "avx2" or "portable"
void force_isa(const char* name);  // or "auto"; throws std::invalid_argument when this processor lacks it
int num_threads();
void set_num_threads(int threads);

}  // namespace medusa::cpu
