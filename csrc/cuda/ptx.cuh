// Every PTX instruction and every launch of the CUDA backend, each behind a small function. Kernels use nothing below
// this header directly, so tests/emulation/cuda_emu.h can stand in for all of it and run their bodies on the CPU.
#pragma once
#ifdef MEDUSA_EMULATE
#include "cuda_emu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

namespace medusa::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kLargeBlock = 1024;  // threads of a block that has a multiprocessor to itself

// ---- conversions, to nearest even ----

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(x);
  if constexpr (std::is_same_v<T, f16>) return __float2half_rn(x);
}

// Two 16-bit numbers in one register, `low` in its low half: how the tensor cores take them.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// ---- the order of kernels ----
//
// From sm_90 on a kernel's blocks may start while the kernel before it in the stream still runs (programmatic dependent
// launch; a captured stream gives the graph programmatic edges). The invariant that makes this safe: every thread of
// every kernel calls wait_for_previous_kernel() before it loads or stores any global memory and before it returns.
//
// That wait ends when the previous kernel has completed and all that it wrote is visible. The previous kernel cannot
// have completed before each of its threads had waited for the one before it, and so on: when a wait ends, everything
// earlier in the stream has ended. (A foreign kernel among ours fits in if it is launched in the ordinary way, which
// orders it after all earlier work and ours after it, or if it waits as ours do.) Kernels thus touch memory one after
// another, as they would without the overlap; scratch and counters pass from launch to launch as before. What overlaps
// is the launch itself, a kernel's first arithmetic, and prefetches into L2.

// Waits for all earlier work of the stream. Nothing below sm_90, where launch() orders the kernels.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may start where there is room, once every block of this one has come here: none of this
// kernel's blocks can be kept out by them. Stands right after the wait, so at most two kernels are under way at a time.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Asks for the line at `p` to be brought into L2. Allowed before the wait: it gives this kernel no value, and L2 is
// where every write of the device arrives, so a write by the previous kernel changes the prefetched line too. Nothing
// below sm_90, where there is no wait to make use of.
__device__ __forceinline__ void prefetch_l2(const void* p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// ---- devices ----

// What `ask(device)`, never 0, answers for the current device: asked once a device, since launches come often and a
// graph capture must not wait for the answer. 0 where there is no such device. Each use has a `known` of its own.
constexpr int kDevices = 64;
template <class Ask>
int of_current_device(std::atomic<int> (&known)[kDevices], const Ask& ask) {
  int device = kDevices;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 0;
  int answer = known[device].load(std::memory_order_relaxed);
  if (!answer) known[device].store(answer = ask(device), std::memory_order_relaxed);
  return answer;
}

// Streaming multiprocessors of the current device.
inline int sm_count() {
  static std::atomic<int> known[kDevices];
  const int count = of_current_device(known, [](int device) {
    int result = 0;
    return cudaDeviceGetAttribute(&result, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? result : 1;
  });
  return count ? count : 1;
}

// ---- launch ----

// Whether the code that the current device runs was compiled for sm_90 or later and so has the wait: a newer device may
// run what was made from an older architecture's PTX. All kernels are compiled alike.
// MEDUSA_OVERLAP=0 in the environment answers no: kernels one after another, to measure what the overlap gains.
inline bool kernels_wait(const void* kernel) {
  static const char* const wanted = std::getenv("MEDUSA_OVERLAP");
  if (wanted && *wanted == '0') return false;
  constexpr int kNo = 1, kYes = 2;
  static std::atomic<int> known[kDevices];
  return of_current_device(known, [&](int) {
           cudaFuncAttributes code = {};
           return cudaFuncGetAttributes(&code, kernel) == cudaSuccess && code.ptxVersion >= 90 ? kYes : kNo;
         }) == kYes;
}

// Enqueues kernel(args...) on `stream` and returns the cudaError_t. Shared memory beyond 48 KB is asked for here.
template <class... Params, class... Args>
int launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, uintptr_t stream, Args... args) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  if (kernels_wait(reinterpret_cast<const void*>(kernel))) {
    config.attrs = &overlap;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// ---- shared memory ----

// The block's dynamic shared memory as one struct: the only way kernels reach shared memory.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  extern __shared__ __align__(128) unsigned char medusa_shared_memory[];
  return *reinterpret_cast<T*>(medusa_shared_memory);
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- global to shared, asynchronous ----

// 16 bytes, past L1; zeros instead when `valid` is false, and then `from` is not read.
__device__ __forceinline__ void cp_async16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0));
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }

// Waits until at most `Pending` of this thread's groups are still in flight.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- global loads ----
//
// Never the non-coherent kind (.nc), which is for what nobody writes during the kernel's lifetime: the previous kernel
// may write it while this one already waits.

// 16 bytes that nobody reads twice: kept out of L1.
__device__ __forceinline__ uint4 load_streaming(const void* p) {
  uint4 r;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}

// 16 bytes that other warps read too. Both of these loads stay where they are written, ahead of what uses them: the
// compiler would sink a plain load to its use, and each warp would then wait for memory once per load.
__device__ __forceinline__ uint4 load_cached(const void* p) {
  uint4 r;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
  return r;
}

// Past L1, which does not see what other blocks wrote during this launch.
template <class T>
__device__ __forceinline__ T load_l2(const T* p) {
  return __ldcg(p);
}

// ---- tensor cores ----

// Four 8x8 tiles of 16-bit elements; lane l gives the address of row l % 8 of tile l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16x8, fp32) += a (16x16, row-major) · b (16x8, column-major). T names the type of the 16-bit elements.
template <class T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_16816<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_16816<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace medusa::cuda
#endif
