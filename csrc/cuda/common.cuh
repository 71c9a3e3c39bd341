// What several kernels share: dtype dispatch, wide loads, reductions.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "cuda/ptx.cuh"
#include "params.h"

namespace medusa::cuda {

// Calls f with a value of the element type and returns what it returns.
template <class F>
int with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    default:
      return f(f16{});
  }
}

// As with_type, for what runs on tensor cores.
template <class F>
int with_half_type(DType dtype, F f) {
  return dtype == DType::bf16 ? f(bf16{}) : f(f16{});
}

// f(integral constant 16 / sizeof(T)) where 16-byte accesses are allowed, else f(1).
template <class T, class F>
int with_width(bool aligned16, F f) {
  return aligned16 ? f(std::integral_constant<int, 16 / sizeof(T)>{}) : f(std::integral_constant<int, 1>{});
}

inline bool multiple_of_16(std::initializer_list<const void*> addresses, std::initializer_list<int64_t> sizes,
                           size_t element_size) {
  uint64_t bits = 0;
  for (const void* p : addresses) bits |= reinterpret_cast<uintptr_t>(p);
  for (const int64_t n : sizes) bits |= static_cast<uint64_t>(n) * element_size;
  return bits % 16 == 0;
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// N elements moved by as few accesses as their size allows.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vector {
  T at[N];
};

template <int N, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  const auto v = *reinterpret_cast<const Vector<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(v.at[i]);
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  Vector<T, N> v;
#pragma unroll
  for (int i = 0; i < N; ++i) v.at[i] = from_float<T>(from[i]);
  *reinterpret_cast<Vector<T, N>*>(to) = v;
}

// For the odd weight in a dtype of its own, where a template parameter would not pay.
__device__ __forceinline__ float load_any(const void* from, DType dtype, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(from)[i];
  if (dtype == DType::bf16) return to_float(static_cast<const bf16*>(from)[i]);
  return to_float(static_cast<const f16*>(from)[i]);
}

// Over groups of `Lanes` neighbouring lanes; every lane gets the result.
template <int Lanes = 32>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int by = Lanes / 2; by > 0; by /= 2) x += __shfl_xor_sync(kFullWarp, x, by);
  return x;
}

template <int Lanes = 32>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int by = Lanes / 2; by > 0; by /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, by));
  return x;
}

// Each lane gets the sum of its own and all lower lanes.
template <class X>
__device__ __forceinline__ X inclusive_scan(X x) {
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const X other = __shfl_up_sync(kFullWarp, x, by);
    if (static_cast<int>(threadIdx.x % 32) >= by) x += other;
  }
  return x;
}

// Every thread gets the sum over the block, added in one fixed order. `partial` has a float per warp.
__device__ __forceinline__ float block_sum(float x, float* partial) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  const float mine = threadIdx.x % 32 < blockDim.x / 32 ? partial[threadIdx.x % 32] : 0.0f;
  __syncthreads();  // `partial` may be written again at once
  return warp_sum(mine);
}

// Keys order like the numbers they stand for; -0 and +0 share one. NaN, positive once added to, is the largest.
__device__ __forceinline__ uint32_t order_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float key_value(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// One key for a number and its id: the larger number first, of equal ones the lower id.
__device__ __forceinline__ uint64_t rank_key(float x, int id) {
  return static_cast<uint64_t>(order_key(x)) << 32 | (0xffffffffu - id);
}
__device__ __forceinline__ float rank_value(uint64_t key) { return key_value(static_cast<uint32_t>(key >> 32)); }
__device__ __forceinline__ int rank_id(uint64_t key) {
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(key));
}

// Whether this block is the last of `expected` to come here; what all of them wrote before is then visible to it,
// through load_l2. The counter is 0 again afterwards, ready for the next launch. `shared` is any flag in shared memory.
__device__ __forceinline__ bool last_to_arrive(uint32_t* counter, uint32_t expected, bool* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *shared = atomicAdd(counter, 1u) == expected - 1;
    if (*shared) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  return *shared;
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

}  // namespace medusa::cuda
