// The kernels of one instruction set, as dispatch.cpp sees them: the same names in one namespace each.
#pragma once
#include <stdint.h>

#include "params.h"

#define MEDUSA_DECLARE_KERNELS(isa)                                                                                  \
  namespace medusa::cpu::isa {                                                                                       \
  void tree_attention(const TreeAttentionParams&);                                                                   \
  void rotary_append(const RotaryAppendParams&);                                                                     \
  void rms_norm(const RmsNormParams&);                                                                               \
  void silu_mul(const SiluMulParams&);                                                                               \
  void linear(const LinearParams&);                                                                                  \
  void draft_heads(const DraftHeadsParams&);                                                                         \
  void verify_tree(const VerifyTreeParams&);                                                                         \
  void verify_lm_head(const VerifyLmHeadParams&);                                                                    \
  void compact_kv(const CompactKvParams&);                                                                           \
  int64_t packed_bytes(int matrices, int out_features, int in_features, WeightFormat);                               \
  void pack(const void* weight, void* packed, int matrices, int out_features, int in_features, DType, WeightFormat); \
  }

MEDUSA_DECLARE_KERNELS(portable)
#ifdef MEDUSA_X86
MEDUSA_DECLARE_KERNELS(avx2)
MEDUSA_DECLARE_KERNELS(avx512)
#endif
