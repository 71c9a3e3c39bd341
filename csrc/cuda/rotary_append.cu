// rotary_append: a few neighbouring lanes per (node, head). Heads are numbered q's first, then k's, then v's.
#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace medusa::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerSm = 4;  // stated, or ptxas spills for the sake of more

// Rotates one head by `lanes` lanes, of which this is `lane`, after its RMSNorm if `norm` is given.
// N: elements per access. In place (from == to) is fine: no element is read after it was written.
template <int N, int Lanes, class From, class To>
__device__ void rotate_head(const RotaryAppendParams& p, const From* from, To* to, const void* norm, int64_t position,
                            int lane, bool active) {
  const int half = p.rotary_dim / 2;
  float factor = 1;
  if (norm) {
    float squares = 0;
    for (int i = lane * N; active && i < p.head_dim; i += Lanes * N) {
      float v[N];
      load<N>(from + i, v);
#pragma unroll
      for (int j = 0; j < N; ++j) squares += v[j] * v[j];
    }
    factor = rsqrtf(warp_sum<Lanes>(squares) / p.head_dim + p.norm_eps);
  }
  if (!active) return;
  const auto normalise = [&](float (&v)[N], int i) {
    if (!norm) return;
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = v[j] * factor * load_any(norm, p.norm_dtype, i + j);
  };
  for (int i = lane * N; i < half; i += Lanes * N) {
    float a[N], b[N], c[N], s[N], first[N], second[N];
    load<N>(from + i, a);
    load<N>(from + half + i, b);
    normalise(a, i);
    normalise(b, half + i);
    load<N>(p.cos + position * half + i, c);
    load<N>(p.sin + position * half + i, s);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      first[j] = a[j] * c[j] - b[j] * s[j];
      second[j] = b[j] * c[j] + a[j] * s[j];
    }
    store<N>(to + i, first);
    store<N>(to + half + i, second);
  }
  for (int i = p.rotary_dim + lane * N; i < p.head_dim; i += Lanes * N) {
    float v[N];
    load<N>(from + i, v);
    normalise(v, i);
    store<N>(to + i, v);
  }
}

// T: of q, k and v. C: of the caches.
template <class T, class C, int N>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) rotary_append_kernel(RotaryAppendParams p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  constexpr int kLanes = N == 1 ? 32 : 8;
  const int lane = threadIdx.x % kLanes;
  const int heads = p.heads + 2 * p.kv_heads;
  const uint32_t index = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  // Lanes past the end stay for their warp's reductions and touch nothing.
  const bool active = index < static_cast<uint32_t>(p.batch) * p.n * heads;
  const uint32_t node_index = active ? index / heads : 0;
  const int b = node_index / p.n, node = node_index % p.n;
  int head = active ? index % heads : 0;

  const int64_t cache_row = p.cache_seqlens[b] + node;
  const int64_t position = p.cache_seqlens[b] + p.depths[b * p.depths_batch_stride + node];
  const auto cache_at = [&](void* cache, int kv_head) {
    return static_cast<C*>(cache) + b * p.kv_batch_stride + cache_row * p.kv_row_stride + kv_head * p.kv_head_stride;
  };

  // q, k and v take the same path as far as the warp's reductions go: a warp may hold heads of all three.
  const bool is_q = head < p.heads, is_k = !is_q && head < p.heads + p.kv_heads;
  if (!is_q) head -= is_k ? p.heads : p.heads + p.kv_heads;
  const T* from =
      is_q   ? static_cast<const T*>(p.q) + b * p.q_batch_stride + node * p.q_row_stride + head * p.q_head_stride
      : is_k ? static_cast<const T*>(p.k) + b * p.k_batch_stride + node * p.k_row_stride + head * p.k_head_stride
             : static_cast<const T*>(p.v) + b * p.v_batch_stride + node * p.v_row_stride + head * p.v_head_stride;
  rotate_head<N, kLanes>(p, from, const_cast<T*>(from), p.q_norm, position, lane, active && is_q);
  rotate_head<N, kLanes>(p, from, is_k ? cache_at(p.k_cache, head) : nullptr, p.k_norm, position, lane, active && is_k);
  if (active && !is_q && !is_k) {
    C* to = cache_at(p.v_cache, head);
    for (int i = lane * N; i < p.head_dim; i += kLanes * N) {
      float v[N];
      load<N>(from + i, v);
      store<N>(to + i, v);
    }
  }
}

}  // namespace

int rotary_append(const RotaryAppendParams& p, uintptr_t stream) {
  // Sixteen bytes of the narrower type are N elements; N divides every row, head, half and cosine row.
  const bool aligned =
      multiple_of_16({p.q, p.k, p.v, p.k_cache, p.v_cache, p.cos, p.sin},
                     {p.q_batch_stride, p.q_row_stride, p.q_head_stride, p.k_batch_stride, p.k_row_stride,
                      p.k_head_stride, p.v_batch_stride, p.v_row_stride, p.v_head_stride, p.kv_batch_stride,
                      p.kv_row_stride, p.kv_head_stride, p.head_dim, p.rotary_dim / 2},
                     2);
  return with_type(p.dtype, [&](auto t) {
    return with_type(p.kv_dtype, [&](auto c) {
      const auto run = [&](auto n) {
        constexpr int kRows = kThreads / (n() == 1 ? 32 : 8);
        const int64_t rows = static_cast<int64_t>(p.batch) * p.n * (p.heads + 2 * p.kv_heads);
        return launch(rotary_append_kernel<decltype(t), decltype(c), n()>, static_cast<unsigned>(ceil_div(rows, kRows)),
                      kThreads, 0, stream, p);
      };
      return aligned ? run(std::integral_constant<int, 8>{}) : run(std::integral_constant<int, 1>{});
    });
  });
}

}  // namespace medusa::cuda
