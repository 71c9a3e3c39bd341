// Picks the instruction set once, at the first launch: the best that the processor has, or the one that MEDUSA_ISA
// names.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "ops.h"

namespace medusa::cpu {
namespace {

struct Kernels {
  const char* name;
  bool (*supported)();
  decltype(&portable::tree_attention) tree_attention;
  decltype(&portable::rotary_append) rotary_append;
  decltype(&portable::rms_norm) rms_norm;
  decltype(&portable::silu_mul) silu_mul;
  decltype(&portable::linear) linear;
  decltype(&portable::draft_heads) draft_heads;
  decltype(&portable::verify_tree) verify_tree;
  decltype(&portable::verify_lm_head) verify_lm_head;
  decltype(&portable::compact_kv) compact_kv;
  decltype(&portable::packed_bytes) packed_bytes;
  decltype(&portable::pack) pack;
};

#define MEDUSA_KERNELS(isa, supported)                                                                          \
  {#isa,        supported,        isa::tree_attention, isa::rotary_append,  isa::rms_norm,   isa::silu_mul,     \
   isa::linear, isa::draft_heads, isa::verify_tree,    isa::verify_lm_head, isa::compact_kv, isa::packed_bytes, \
   isa::pack}

#ifdef MEDUSA_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
bool always() { return true; }

// Best first.
const Kernels tables[] = {
#ifdef MEDUSA_X86
    MEDUSA_KERNELS(avx512, has_avx512), MEDUSA_KERNELS(avx2, has_avx2),
#endif
    MEDUSA_KERNELS(portable, always)};

const Kernels* pick(const char* name) {
  const bool any = !std::strcmp(name, "auto");
  std::string names;
  for (const Kernels& kernels : tables) {
    if ((any || !std::strcmp(name, kernels.name)) && kernels.supported()) return &kernels;
    names += std::string(", ") + kernels.name;
  }
  throw std::invalid_argument(std::string("instruction set ") + name +
                              " is unknown or this processor lacks it; there are auto" + names);
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_relaxed);
  if (!table) {
    const char* name = std::getenv("MEDUSA_ISA");
    chosen.store(table = pick(name && *name ? name : "auto"), std::memory_order_relaxed);
  }
  return *table;
}

}  // namespace

void tree_attention(const TreeAttentionParams& p) { kernels().tree_attention(p); }
void rotary_append(const RotaryAppendParams& p) { kernels().rotary_append(p); }
void rms_norm(const RmsNormParams& p) { kernels().rms_norm(p); }
void silu_mul(const SiluMulParams& p) { kernels().silu_mul(p); }
void linear(const LinearParams& p) { kernels().linear(p); }
void draft_heads(const DraftHeadsParams& p) { kernels().draft_heads(p); }
void verify_tree(const VerifyTreeParams& p) { kernels().verify_tree(p); }
void verify_lm_head(const VerifyLmHeadParams& p) { kernels().verify_lm_head(p); }
void compact_kv(const CompactKvParams& p) { kernels().compact_kv(p); }

int64_t packed_bytes(int matrices, int out_features, int in_features, WeightFormat format) {
  return kernels().packed_bytes(matrices, out_features, in_features, format);
}
void pack(const void* weight, void* packed, int matrices, int out_features, int in_features, DType dtype,
          WeightFormat format) {
  kernels().pack(weight, packed, matrices, out_features, in_features, dtype, format);
}

const char* isa() { return kernels().name; }
void force_isa(const char* name) { chosen.store(pick(name), std::memory_order_relaxed); }

}  // namespace medusa::cpu
