// tree_attention row by row: for what the tensor cores do not take (fp32, mixed dtypes, odd head sizes and strides),
// and for those who ask that a row's bits be independent of all rows beside it.
//
// One block per query row. A row's keys are counted by their rank among the keys that it sees: the prefix, then its
// ancestors, wherever they stand in the tree. So a node's result is, bit for bit, that of plain decoding after the same
// tokens.
#pragma once
#include "cuda/common.cuh"

namespace medusa::cuda {
namespace by_rank {

constexpr int kWarps = 8, kThreads = 32 * kWarps;

struct Shared {
  float q[kMaxHeadDim];
  float out[kWarps][kMaxHeadDim];
  float maximum[kWarps], sum[kWarps];
  int ancestors[kMaxNodes];  // the nodes that the row sees, rising
};

// T: of q and out. C: of the caches. N: elements of a key read at once. A warp takes every kWarps-th run of 32 ranks:
// one key a lane for the scores, then one column in 32 a lane for the values.
template <class T, class C, int N>
__global__ void __launch_bounds__(kThreads) tree_attention_kernel(TreeAttentionParams p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  Shared& s = shared_memory<Shared>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = blockIdx.x % p.heads;
  const int node = blockIdx.x / p.heads % p.n;
  const int b = blockIdx.x / p.heads / p.n;
  const int kv_head = head / (p.heads / p.kv_heads);
  const int prefix = p.cache_seqlens[b];

  const uint64_t* mask = p.tree_mask + b * p.mask_batch_stride + static_cast<int64_t>(node) * p.words;
  const auto seen_below = [&](int other) {
    int count = 0;
    for (int w = 0; w < other / 64; ++w) count += __popcll(mask[w]);
    return other % 64 ? count + __popcll(mask[other / 64] & ((1ull << other % 64) - 1)) : count;
  };
  for (int other = threadIdx.x; other < p.n; other += kThreads) {
    if (mask[other / 64] >> (other % 64) & 1) s.ancestors[seen_below(other)] = other;
  }
  const int keys = prefix + seen_below(p.n);

  const T* q = static_cast<const T*>(p.q) + b * p.q_batch_stride + node * p.q_row_stride + head * p.q_head_stride;
  for (int d = threadIdx.x; d < p.head_dim; d += kThreads) s.q[d] = to_float(q[d]) * p.scale;
  __syncthreads();

  // The one place that knows where a key's or value's row lies.
  const auto kv_row = [&](const void* cache, int rank) {
    const int row = rank < prefix ? rank : prefix + s.ancestors[rank - prefix];
    return static_cast<const C*>(cache) + b * p.kv_batch_stride + row * p.kv_row_stride + kv_head * p.kv_head_stride;
  };

  float out[kMaxHeadDim / 32] = {}, maximum = -INFINITY, sum = 0;
  for (int first = warp * 32; first < keys; first += kThreads) {
    const int count = min(32, keys - first);
    float score = -INFINITY;
    if (lane < count) {
      const C* k = kv_row(p.k_cache, first + lane);
      score = 0;
      for (int d = 0; d < p.head_dim; d += N) {
        float part[N];
        load<N>(k + d, part);
#pragma unroll
        for (int i = 0; i < N; ++i) score += s.q[d + i] * part[i];
      }
    }
    const float highest = fmaxf(maximum, warp_max(score));
    const float base = highest == -INFINITY ? 0.0f : highest;  // every score so far may have overflowed
    const float weight = expf(score - base), correction = expf(maximum - base);
    maximum = highest;
    sum = sum * correction + warp_sum(weight);
#pragma unroll
    for (int i = 0; i < kMaxHeadDim / 32; ++i) out[i] *= correction;
    for (int j = 0; j < count; ++j) {
      const float w = __shfl_sync(kFullWarp, weight, j);
      const C* v = kv_row(p.v_cache, first + j);
#pragma unroll
      for (int i = 0; i < kMaxHeadDim / 32; ++i) {
        const int d = i * 32 + lane;
        if (d < p.head_dim) out[i] += w * to_float(v[d]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kMaxHeadDim / 32; ++i) s.out[warp][i * 32 + lane] = out[i];
  if (lane == 0) {
    s.maximum[warp] = maximum;
    s.sum[warp] = sum;
  }
  __syncthreads();

  T* to = static_cast<T*>(p.out) + ((static_cast<int64_t>(b) * p.n + node) * p.heads + head) * p.head_dim;
  for (int d = threadIdx.x; d < p.head_dim; d += kThreads) {
    float highest = s.maximum[0], total = 0, value = 0;
    for (int w = 1; w < kWarps; ++w) highest = fmaxf(highest, s.maximum[w]);
    for (int w = 0; w < kWarps; ++w) {
      const float weight = expf(s.maximum[w] - highest);
      total += weight * s.sum[w];
      value += weight * s.out[w][d];
    }
    to[d] = from_float<T>(value / total);
  }
}

}  // namespace by_rank

inline int tree_attention_by_rank(const TreeAttentionParams& p, uintptr_t stream) {
  const size_t element = p.kv_dtype == DType::f32 ? 4 : 2;
  const bool aligned =
      multiple_of_16({p.k_cache}, {p.kv_batch_stride, p.kv_row_stride, p.kv_head_stride, p.head_dim}, element);
  return with_type(p.q_dtype, [&](auto t) {
    return with_type(p.kv_dtype, [&](auto c) {
      using C = decltype(c);
      return with_width<C>(aligned, [&](auto n) {
        return launch(by_rank::tree_attention_kernel<decltype(t), C, n()>,
                      static_cast<unsigned>(p.batch) * p.n * p.heads, by_rank::kThreads, sizeof(by_rank::Shared),
                      stream, p);
      });
    });
  });
}

}  // namespace medusa::cuda
