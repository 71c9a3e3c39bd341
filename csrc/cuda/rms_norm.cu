// rms_norm: one block a row. The second pass finds its row in L1 or L2, so memory is read once.
#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace medusa::cuda {
namespace {

constexpr int kThreads = 256;

struct Shared {
  float partial[kThreads / 32];
};

// N: elements per access. T: of x, residual and out. W: of weight.
template <class T, class W, int N>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(RmsNormParams p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  Shared& s = shared_memory<Shared>();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
  T* residual = p.residual ? static_cast<T*>(p.residual) + row * p.residual_row_stride : nullptr;
  T* out = static_cast<T*>(p.out) + row * p.hidden;

  float squares = 0;
  for (int i = threadIdx.x * N; i < p.hidden; i += kThreads * N) {
    float v[N];
    load<N>(x + i, v);
    if (residual) {
      float r[N];
      load<N>(residual + i, r);
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = to_float(from_float<T>(r[j] + v[j]));  // the norm is that of the stored sum
      store<N>(residual + i, v);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) squares += v[j] * v[j];
  }
  const float factor = rsqrtf(block_sum(squares, s.partial) / p.hidden + p.eps);

  const T* normalised = residual ? residual : x;  // each thread reads again what it read or wrote itself
  for (int i = threadIdx.x * N; i < p.hidden; i += kThreads * N) {
    float v[N], w[N];
    load<N>(normalised + i, v);
    load<N>(static_cast<const W*>(p.weight) + i, w);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = v[j] * factor * w[j];
    store<N>(out + i, v);
  }
}

}  // namespace

int rms_norm(const RmsNormParams& p, uintptr_t stream) {
  const size_t narrower = p.dtype == DType::f32 ? 4 : 2;
  const bool aligned =
      multiple_of_16({p.x, p.residual, p.weight, p.out}, {p.x_row_stride, p.residual_row_stride, p.hidden}, narrower);
  return with_type(p.dtype, [&](auto t) {
    return with_type(p.weight_dtype, [&](auto w) {
      return with_width<decltype(t)>(aligned, [&](auto n) {
        return launch(rms_norm_kernel<decltype(t), decltype(w), n()>, p.rows, kThreads, sizeof(Shared), stream, p);
      });
    });
  });
}

}  // namespace medusa::cuda
