// tree_attention for what the tensor cores do not take: fp32, mixed dtypes, odd head sizes and strides. One block per
// query row.
#pragma once
#include "cuda/common.cuh"

namespace medusa::cuda {
namespace plain {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kMaxDim = 256;

struct Shared {
  float q[kMaxDim];
  float out[kWarps][kMaxDim];
  float maximum[kWarps], sum[kWarps];
};

// T: of q and out. C: of the caches. A warp takes every fourth run of 32 keys: one key a lane for the scores, then one
// column in 32 a lane for the values.
template <class T, class C>
__global__ void __launch_bounds__(kThreads) tree_attention_kernel(TreeAttentionParams p) {
  Shared& s = shared_memory<Shared>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = blockIdx.x % p.heads;
  const int node = blockIdx.x / p.heads % p.n;
  const int b = blockIdx.x / p.heads / p.n;
  const int kv_head = head / (p.heads / p.kv_heads);
  const int prefix = p.cache_seqlens[b], keys = prefix + p.n;
  const uint64_t* mask = p.tree_mask + b * p.mask_batch_stride + static_cast<int64_t>(node) * p.words;

  // The one place that knows where a key's or value's row lies.
  const auto kv_row = [&](const void* cache, int key) {
    return static_cast<const C*>(cache) + b * p.kv_batch_stride + key * p.kv_row_stride + kv_head * p.kv_head_stride;
  };
  const T* q = static_cast<const T*>(p.q) + b * p.q_batch_stride + node * p.q_row_stride + head * p.q_head_stride;
  for (int d = threadIdx.x; d < p.head_dim; d += kThreads) s.q[d] = to_float(q[d]) * p.scale;
  __syncthreads();

  float out[kMaxDim / 32] = {}, maximum = -INFINITY, sum = 0;
  for (int first = warp * 32; first < keys; first += kThreads) {
    const int key = first + lane, in_tree = key - prefix;
    const bool visible = key < keys && (in_tree < 0 || (mask[in_tree / 64] >> (in_tree % 64) & 1));
    float score = -INFINITY;
    if (visible) {
      const C* k = kv_row(p.k_cache, key);
      score = 0;
      for (int d = 0; d < p.head_dim; ++d) score += s.q[d] * to_float(k[d]);
    }
    const float highest = fmaxf(maximum, warp_max(score));
    if (highest == -INFINITY) continue;
    const float weight = expf(score - highest), correction = expf(maximum - highest);
    maximum = highest;
    sum = sum * correction + warp_sum(weight);
#pragma unroll
    for (int i = 0; i < kMaxDim / 32; ++i) out[i] *= correction;
    for (int j = 0; j < 32; ++j) {
      const float w = __shfl_sync(kFullWarp, weight, j);
      if (w == 0) continue;  // masked, or beyond the last key, where memory may hold anything
      const C* v = kv_row(p.v_cache, first + j);
#pragma unroll
      for (int i = 0; i < kMaxDim / 32; ++i) {
        const int d = i * 32 + lane;
        if (d < p.head_dim) out[i] += w * to_float(v[d]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kMaxDim / 32; ++i) s.out[warp][i * 32 + lane] = out[i];
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

}  // namespace plain

inline int tree_attention_plain(const TreeAttentionParams& p, uintptr_t stream) {
  return with_type(p.q_dtype, [&](auto t) {
    return with_type(p.kv_dtype, [&](auto c) {
      return launch(plain::tree_attention_kernel<decltype(t), decltype(c)>,
                    static_cast<unsigned>(p.batch) * p.n * p.heads, plain::kThreads, sizeof(plain::Shared), stream, p);
    });
  });
}

}  // namespace medusa::cuda
