// CUDA on the CPU: the second implementation of csrc/cuda/ptx.cuh, so that a kernel's body compiles unchanged with g++.
//
// One fiber per CUDA thread, blocks one after another. It is stricter than a GPU where that finds faults: a barrier or
// warp collective that not every thread reaches is an error; shared memory starts as NaN in every block and must not be
// overrun; cp.async copies nothing before it is waited for, and until then its target reads as NaN; every thread must
// wait for the previous kernel, before the loads that can be seen here and before it ends.
// MEDUSA_EMULATE_REVERSED runs threads and blocks in falling order, so that a missing barrier shows in one of the two
// orders.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace emu {

constexpr int kWarp = 32;
constexpr size_t kSharedLimit = 227 * 1024;  // of sm_90

inline dim3 thread_index, block_index, block_size, grid_size;

// Parks the running thread at the block's barrier.
void block_barrier();

// Gathers the warp. The last lane to arrive calls `work` once with every lane's `data`; then all lanes go on.
using WarpWork = void (*)(void* const (&data)[kWarp]);
void warp_collective(WarpWork work, void* data);

// One cp.async of the running thread: remembered, and done by the wait that covers it.
void copy_later(void* to, const void* from, bool valid);
void commit_copies();
void wait_for_copies(size_t pending_groups);

// The running thread has waited for the previous kernel; must have.
void wait_for_previous_kernel();
void require_previous_kernel();

unsigned char* shared_memory();

// Runs `body` once per thread of the grid. Throws std::runtime_error on a divergent barrier or a shared-memory overrun.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// Each lane gives one In and gets one Out, by f(lane, all lanes' In).
template <class In, class Out, class F>
Out exchange(const In& in, F f) {
  struct Data {
    In in;
    Out out;
    F* f;
  } data{in, {}, &f};
  warp_collective(
      [](void* const(&lanes)[kWarp]) {
        const auto get = [&](int lane) -> const In& { return static_cast<Data*>(lanes[lane])->in; };
        for (int lane = 0; lane < kWarp; ++lane) {
          Data& own = *static_cast<Data*>(lanes[lane]);
          own.out = (*own.f)(lane, get);
        }
      },
      &data);
  return data.out;
}

}  // namespace emu

#define threadIdx emu::thread_index
#define blockIdx emu::block_index
#define blockDim emu::block_size
#define gridDim emu::grid_size

using std::max;
using std::min;

inline void __syncthreads() { emu::block_barrier(); }
inline void __syncwarp() {
  emu::warp_collective([](void* const(&)[emu::kWarp]) {}, nullptr);
}
inline void __threadfence() {}

inline void require_full_warp(unsigned mask) {
  if (mask != 0xffffffffu) throw std::runtime_error("emulation: a warp collective must name all 32 lanes");
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  require_full_warp(mask);
  struct In {
    T value;
    int by;
  };
  return emu::exchange<In, T>({value, lane_mask}, [](int lane, auto get) { return get(lane ^ get(lane).by).value; });
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  require_full_warp(mask);
  struct In {
    T value;
    int from;
  };
  return emu::exchange<In, T>({value, source}, [](int lane, auto get) { return get(get(lane).from & 31).value; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta) {
  require_full_warp(mask);
  struct In {
    T value;
    int by;
  };
  return emu::exchange<In, T>({value, delta}, [](int lane, auto get) {
    const int from = lane - get(lane).by;
    return get(from < 0 ? lane : from).value;
  });
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  require_full_warp(mask);
  return emu::exchange<bool, unsigned>(predicate, [](int, auto get) {
    unsigned bits = 0;
    for (int lane = 0; lane < emu::kWarp; ++lane) bits |= unsigned(get(lane)) << lane;
    return bits;
  });
}

template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
inline unsigned atomicAdd(unsigned* at, int value) { return atomicAdd(at, unsigned(value)); }
template <class T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = std::max(before, value);
  return before;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

namespace medusa::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kLargeBlock = 64;  // several warps, and cheap

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
float to_float(f16 x);
template <class T>
T from_float(float x);

template <class T>
uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

template <class... Params, class... Args>
int launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, uintptr_t, Args... args) {
  emu::run(grid, block, shared_bytes, [&] { kernel(args...); });
  return 0;
}

inline void wait_for_previous_kernel() { emu::wait_for_previous_kernel(); }
inline void let_next_kernel_start() { emu::require_previous_kernel(); }
inline void prefetch_l2(const void* p) { static_cast<void>(*static_cast<const volatile char*>(p)); }  // it must exist

// Few, so that small cases still split their work over several blocks.
inline int sm_count() { return 6; }

template <class T>
T& shared_memory() {
  return *reinterpret_cast<T*>(emu::shared_memory());
}

inline void cp_async16(void* to, const void* from, bool valid) {
  if ((reinterpret_cast<uintptr_t>(to) | (valid ? reinterpret_cast<uintptr_t>(from) : 0)) % 16) {
    throw std::runtime_error("emulation: cp.async of an address that is not 16-byte aligned");
  }
  emu::copy_later(to, from, valid);
}
inline void cp_async_commit() { emu::commit_copies(); }
template <int Pending>
void cp_async_wait() {
  emu::wait_for_copies(Pending);
}

inline uint4 load_streaming(const void* p) {
  emu::require_previous_kernel();
  if (reinterpret_cast<uintptr_t>(p) % 16) throw std::runtime_error("emulation: unaligned 16-byte load");
  return *static_cast<const uint4*>(p);
}

inline uint4 load_cached(const void* p) { return load_streaming(p); }

template <class T>
T load_l2(const T* p) {
  emu::require_previous_kernel();
  return *p;
}

void ldmatrix_x4(uint32_t (&r)[4], const void* row);
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row);
template <class T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

}  // namespace medusa::cuda
