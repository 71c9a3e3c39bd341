// silu(gate) * up.
#include "isa.h"
#include "simd.h"
#include "threads.h"

namespace medusa::cpu::MEDUSA_ISA {

void silu_mul(const SiluMulParams& p) {
  constexpr int kSpan = 256;
  const int spans = static_cast<int>(ceil_div(p.ffn, kSpan));
  const auto piece = [&](int index) {
    const int begin = index % spans * kSpan;
    const int64_t row = index / spans, gate = row * p.row_stride + begin, out = row * p.ffn + begin;
    for_vectors(smaller(kSpan, p.ffn - begin), [&](int i, int lanes) {
      const Vec up = load_part(p.gate_up, p.dtype, gate + p.ffn + i, lanes);
      store_part(p.out, p.dtype, out + i, silu(load_part(p.gate_up, p.dtype, gate + i, lanes)) * up, lanes);
    });
  };
  parallel_for(p.rows * spans, 0.5 * p.rows * p.ffn, piece);
}

}  // namespace medusa::cpu::MEDUSA_ISA
