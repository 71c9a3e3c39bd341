// RMSNorm's one sum, for rms_norm and for the norm of a head in rotary_append.
#pragma once
#include "simd.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

inline float inverse_rms(const void* x, DType dtype, int count, float eps) {
  Vec squares[4] = {zero(), zero(), zero(), zero()};
  for_vectors(count, [&](int i, int lanes) {
    const Vec value = load_part(x, dtype, i, lanes);
    Vec& part = squares[i / kWidth % 4];
    part = fma(value, value, part);
  });
  const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  return 1.f / __builtin_sqrtf(total / static_cast<float>(count) + eps);
}

}  // namespace
}  // namespace medusa::cpu::MEDUSA_ISA
