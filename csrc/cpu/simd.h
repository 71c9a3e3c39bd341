// A small vector of floats, one per instruction set, so that an op is written once. Everything here has internal
// linkage: a function compiled for AVX-512 must never be the copy that the linker keeps for the portable kernels. For
// the same reason files that include this one use no templates or inline functions of the standard library.
#pragma once
#include <stdint.h>
#include <string.h>

#include "params.h"

#if defined(MEDUSA_ISA_avx512) || defined(MEDUSA_ISA_avx2)
#include <immintrin.h>
#endif

namespace medusa::cpu::MEDUSA_ISA {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#if defined(MEDUSA_ISA_avx512)
#include "simd_avx512.h"
#elif defined(MEDUSA_ISA_avx2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

template <class T>
inline T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T larger(T a, T b) {
  return a < b ? b : a;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The first `count` lanes, the rest 0; nothing behind them is read.
template <class T>
inline Vec load_part(const T* p, int count) {
  if (count >= kWidth) return load(p);
  T lanes[kWidth] = {};
  memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}

template <class T>
inline void store_part(T* p, Vec a, int count) {
  if (count >= kWidth) return store(p, a);
  T lanes[kWidth];
  store(lanes, a);
  memcpy(p, lanes, count * sizeof(T));
}

// The first `count` lanes of a, the rest `other`.
inline Vec first_lanes(Vec a, int count, float other) {
  if (count >= kWidth) return a;
  float lanes[kWidth];
  store(lanes, a);
  for (int i = count; i < kWidth; ++i) lanes[i] = other;
  return load(lanes);
}

// Calls body(offset, lanes) for each vector of `count` elements; only the last may have fewer than kWidth lanes.
template <class Body>
inline void for_vectors(int count, Body body) {
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) body(i, kWidth);
  if (i < count) body(i, count - i);
}

// Calls body with a null pointer of the element type that `dtype` names.
template <class Body>
inline void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::f32:
      return body(static_cast<float*>(nullptr));
    case DType::bf16:
      return body(static_cast<bf16*>(nullptr));
    case DType::f16:
      return body(static_cast<f16*>(nullptr));
  }
}
template <class Pointer>
struct Pointee;
template <class T>
struct Pointee<T*> {
  using type = T;
};
template <class Pointer>
using pointee = typename Pointee<Pointer>::type;

// A number as a type, so that a body is compiled for it.
template <int N>
struct Count {
  static constexpr int value = N;
};

inline int element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline Vec load_part(const void* p, DType dtype, int64_t index, int count) {
  if (dtype == DType::f32) return load_part(static_cast<const float*>(p) + index, count);
  if (dtype == DType::bf16) return load_part(static_cast<const bf16*>(p) + index, count);
  return load_part(static_cast<const f16*>(p) + index, count);
}
inline float load_one(const void* p, DType dtype, int64_t index) { return sum(load_part(p, dtype, index, 1)); }
inline void store_part(void* p, DType dtype, int64_t index, Vec a, int count) {
  if (dtype == DType::f32) return store_part(static_cast<float*>(p) + index, a, count);
  if (dtype == DType::bf16) return store_part(static_cast<bf16*>(p) + index, a, count);
  store_part(static_cast<f16*>(p) + index, a, count);
}

inline const void* element(const void* p, DType dtype, int64_t index) {
  return static_cast<const char*>(p) + index * element_size(dtype);
}
inline void* element(void* p, DType dtype, int64_t index) {
  return static_cast<char*>(p) + index * element_size(dtype);
}

// e^x within 2 ulp: x = n ln 2 + r, a polynomial in r (Cephes), times 2^n. Below -104 the result is exactly 0.
inline Vec exp(Vec x) {
  x = min(set(89.f), max(set(-104.f), x));  // in this order NaN stays NaN
  const Vec n = round(x * set(1.44269504088896341f));
  Vec r = fma(n, set(-0.693359375f), x);
  r = fma(n, set(2.12194440e-4f), r);
  Vec p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = fma(p, r * r, r) + set(1.f);
  return scale_by_power(p, n);
}
inline float exp(float x) { return largest(exp(set(x))); }

inline Vec silu(Vec x) { return x / (set(1.f) + exp(zero() - x)); }

}  // namespace
}  // namespace medusa::cpu::MEDUSA_ISA
