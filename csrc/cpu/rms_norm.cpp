// x / sqrt(mean(x^2) + eps) * weight, after residual += x where there is a residual.
#include "rms_norm.h"

#include "isa.h"
#include "threads.h"

namespace medusa::cpu::MEDUSA_ISA {

void rms_norm(const RmsNormParams& p) {
  parallel_for(p.rows, 0.1 * p.rows * p.hidden, [&](int row) {
    const int64_t x = row * p.x_row_stride, residual = row * p.residual_row_stride;
    if (p.residual) {
      for_vectors(p.hidden, [&](int i, int lanes) {
        const Vec added = load_part(p.residual, p.dtype, residual + i, lanes) + load_part(p.x, p.dtype, x + i, lanes);
        store_part(p.residual, p.dtype, residual + i, added, lanes);
      });
    }
    const void* input = p.residual ? element(p.residual, p.dtype, residual) : element(p.x, p.dtype, x);
    const Vec factor = set(inverse_rms(input, p.dtype, p.hidden, p.eps));
    const int64_t out = static_cast<int64_t>(row) * p.hidden;
    for_vectors(p.hidden, [&](int i, int lanes) {
      const Vec value = load_part(input, p.dtype, i, lanes) * factor * load_part(p.weight, p.weight_dtype, i, lanes);
      store_part(p.out, p.dtype, out + i, value, lanes);
    });
  });
}

}  // namespace medusa::cpu::MEDUSA_ISA
