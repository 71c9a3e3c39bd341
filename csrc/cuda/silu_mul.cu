// silu_mul: one thread per 16 bytes of the output.
#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace medusa::cuda {
namespace {

constexpr int kThreads = 256;

template <class T, int N>
__global__ void __launch_bounds__(kThreads) silu_mul_kernel(SiluMulParams p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (i >= static_cast<int64_t>(p.rows) * p.ffn) return;
  const T* gate_at = static_cast<const T*>(p.gate_up) + i / p.ffn * p.row_stride + i % p.ffn;
  float gate[N], up[N];
  load<N>(gate_at, gate);
  load<N>(gate_at + p.ffn, up);
#pragma unroll
  for (int j = 0; j < N; ++j) gate[j] = silu(gate[j]) * up[j];
  store<N>(static_cast<T*>(p.out) + i, gate);
}

}  // namespace

int silu_mul(const SiluMulParams& p, uintptr_t stream) {
  return with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    const bool aligned = multiple_of_16({p.gate_up, p.out}, {p.row_stride, p.ffn}, sizeof(T));
    return with_width<T>(aligned, [&](auto n) {
      const int64_t blocks = ceil_div(static_cast<int64_t>(p.rows) * p.ffn, int64_t{kThreads} * n());
      return launch(silu_mul_kernel<T, n()>, static_cast<unsigned>(blocks), kThreads, 0, stream, p);
    });
  });
}

}  // namespace medusa::cuda
