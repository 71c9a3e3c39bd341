// What one block finds out about one row of logits: its argmax, and a draw from its truncated softmax. All sums have an
// order that depends on the vocabulary alone, so a row gives the same token whatever stands beside it.
#pragma once
#include "cuda/common.cuh"
#include "cuda/slices.cuh"

namespace medusa::cuda {

constexpr int kRowThreads = kLargeBlock, kRowWarps = kRowThreads / 32;
constexpr float kNearly = 1 - 0x1p-20f;  // of top_p: a set short of it by rounding alone has reached it
constexpr int kProbes = 7;               // thresholds tried per pass over the row: 2^32 keys take 11 passes

struct RowShared {
  float partial[kRowWarps][kProbes];
  uint64_t best[kRowWarps];
  float segment_mass[kRowWarps];
  int segment_ties[kRowWarps];
  int token;
};

// The tokens that survive truncation: keys above `key`, and the first `ties` ids whose key it is.
struct Kept {
  uint32_t key;
  int ties;
};

// One row, read by the whole block. N: elements per access. Every member function is called by all threads together.
template <class T, int N>
struct Row {
  const T* logits;  // [vocab]
  int vocab;
  RowShared& s;
  float top;  // the largest logit, after argmax()
  float temperature;

  // f(logit, id) for the elements [begin, end) that fall to this thread of `threads`.
  template <class F>
  __device__ __forceinline__ void each(int begin, int end, int thread, int threads, F f) const {
    for (int i = begin + thread * N; i < end; i += threads * N) {
      float v[N];
      load<N>(logits + i, v);
#pragma unroll
      for (int j = 0; j < N; ++j) f(v[j], i + j);
    }
  }
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    each(0, vocab, threadIdx.x, kRowThreads, f);
  }

  __device__ __forceinline__ float shifted(float logit) const { return cuda::shifted(logit, top, temperature); }
  __device__ __forceinline__ float weight(float logit) const { return expf(shifted(logit)); }
  __device__ __forceinline__ float sum(float x) const { return block_sum(x, s.partial[0]); }

  // This lane's part of slice `index` (slices.cuh).
  __device__ __forceinline__ void slice(int index, float (&logit)[kLaneIds]) const {
    const int first = index * kSliceIds + lane() * kLaneIds;
    if (N >= kLaneIds && first < vocab) return load<kLaneIds>(logits + first, logit);
#pragma unroll
    for (int j = 0; j < kLaneIds; ++j) logit[j] = first + j < vocab ? to_float(logits[first + j]) : -INFINITY;
  }

  // The lowest id of the largest logit. Sets `top`.
  __device__ int argmax() {
    uint64_t best = 0;
    each([&](float v, int i) { best = max(best, rank_key(v, i)); });
    const auto over_warp = [](uint64_t x) {
#pragma unroll
      for (int by = 16; by > 0; by /= 2) x = max(x, __shfl_xor_sync(kFullWarp, x, by));
      return x;
    };
    best = over_warp(best);
    if (threadIdx.x % 32 == 0) s.best[threadIdx.x / 32] = best;
    __syncthreads();
    best = over_warp(lane() < kRowWarps ? s.best[lane()] : 0);
    __syncthreads();
    top = rank_value(best);
    return rank_id(best);
  }

  // The lowest key t >= lowest for which the sum of value(logit) over all keys above t is below `target`, and that sum.
  template <class Value>
  __device__ uint32_t threshold(uint32_t lowest, float target, Value value, float* sum_above) const {
    uint32_t low = lowest, high = order_key(top);
    float above_high = 0;
    while (low < high) {
      const uint32_t step = (high - low) / (kProbes + 1) + 1;
      const auto probe = [&](int j) {
        return static_cast<uint32_t>(min(uint64_t{low} + (j + 1) * uint64_t{step} - 1, uint64_t{high}));
      };
      float above[kProbes] = {};
      each([&](float v, int) {
        const uint32_t key = order_key(v);
        if (key <= low || key > high) return;
        const float x = value(v);
#pragma unroll
        for (int j = 0; j < kProbes; ++j) above[j] += key > probe(j) ? x : 0.0f;
      });
#pragma unroll
      for (int j = 0; j < kProbes; ++j) {
        above[j] = warp_sum(above[j]);
        if (threadIdx.x % 32 == 0) s.partial[threadIdx.x / 32][j] = above[j];
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kProbes; ++j)
        above[j] = above_high + warp_sum(lane() < kRowWarps ? s.partial[lane()][j] : 0.0f);
      __syncthreads();
      // From the highest probe down: each that still qualifies becomes the upper end, the first that fails the lower.
      uint32_t new_low = low, new_high = high;
      bool falling = true;
#pragma unroll
      for (int j = kProbes - 1; j >= 0; --j) {
        if (falling && above[j] < target) {
          new_high = probe(j);
          above_high = above[j];
        } else if (falling) {
          new_low = probe(j) + 1;
          falling = false;
        }
      }
      low = new_low;
      high = new_high;
    }
    *sum_above = above_high;
    return high;
  }

  // top_k first (0 = off), then the smallest set whose share of what it left is at least top_p.
  __device__ Kept truncated(int top_k, float top_p) const {
    Kept kept = {0, 0x7fffffff};
    if (top_k > 0 && top_k < vocab) {
      float count_above;
      kept.key = threshold(0, static_cast<float>(top_k), [](float) { return 1.0f; }, &count_above);
      kept.ties = top_k - static_cast<int>(count_above);
    }
    if (top_p < 1 && top == top) {  // NaN beside the weights: no share of them is known to be enough
      float mass = 0, mass_above;
      each([&](float v, int) { mass += order_key(v) > kept.key ? weight(v) : 0.0f; });
      float total = sum(mass);
      if (kept.key) total += kept.ties * weight(key_value(kept.key));
      const float target = kNearly * top_p * total;
      const uint32_t key = threshold(kept.key, target, [&](float v) { return weight(v); }, &mass_above);
      const float needed = ceilf((target - mass_above) / weight(key_value(key)));  // ties until the mass is reached
      const int limit = key == kept.key ? kept.ties : 0x7fffffff;
      kept = {key, needed < static_cast<float>(limit) ? static_cast<int>(needed) : limit};
    }
    return kept;
  }

  // The first id whose running sum of kept weights exceeds u times their total, else the last whose weight is not 0: a
  // token of the vocabulary even where the weights are NaN.
  __device__ int draw(Kept kept, float u) const {
    const int warp = threadIdx.x / 32, lane = this->lane();
    // A warp's segment is contiguous: ids rise from warp to warp.
    const int segment = static_cast<int>(ceil_div(ceil_div(vocab, kRowWarps), 32 * N)) * 32 * N;
    const int begin = min(warp * segment, vocab), end = min(begin + segment, vocab);
    float mass = 0, ties = 0;
    each(begin, end, lane, 32, [&](float v, int) {
      const uint32_t key = order_key(v);
      mass += key > kept.key ? weight(v) : 0.0f;
      ties += key == kept.key ? 1.0f : 0.0f;
    });
    mass = warp_sum(mass);
    ties = warp_sum(ties);
    if (lane == 0) {
      s.segment_mass[warp] = mass;
      s.segment_ties[warp] = static_cast<int>(ties);
    }
    if (threadIdx.x == 0) s.token = -1;
    __syncthreads();

    // Every warp works out the same running sums over the segments, lane by lane.
    const float tie_weight = kept.key ? weight(key_value(kept.key)) : 0.0f;
    const int own_ties = lane < kRowWarps ? s.segment_ties[lane] : 0;
    const int ties_before = inclusive_scan(own_ties) - own_ties;
    const float own_mass = lane < kRowWarps ? s.segment_mass[lane] : 0.0f;
    const int kept_ties = max(min(kept.ties - ties_before, own_ties), 0);
    const float own = kept_ties ? own_mass + kept_ties * tie_weight : own_mass;
    const float running = inclusive_scan(own);
    const float target = u * __shfl_sync(kFullWarp, running, 31);
    const unsigned crossed = __ballot_sync(kFullWarp, running > target && own > 0);
    const unsigned some = __ballot_sync(kFullWarp, own != 0);
    const int chosen = crossed ? __ffs(crossed) - 1 : 31 - __clz(some);
    const float before = __shfl_sync(kFullWarp, running, chosen) - __shfl_sync(kFullWarp, own, chosen);
    const int before_ties = __shfl_sync(kFullWarp, ties_before, chosen);
    if (warp == chosen) {
      const int token = find(begin, end, kept, tie_weight, before, before_ties, target);
      if (lane == 0) s.token = token;
    }
    __syncthreads();
    return s.token;
  }

 private:
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

  // One warp: walks a segment in order of ids until the running sum, which stands at `running`, exceeds target.
  __device__ int find(int begin, int end, Kept kept, float tie_weight, float running, int ties, float target) const {
    const int lane = this->lane();
    int last = -1;
    for (int first = begin; first < end; first += 32 * N) {
      const int i = first + lane * N;
      float w[N], lane_sum = 0;
      int lane_ties = 0;
      uint32_t keys[N] = {};
      if (i < end) {
        load<N>(logits + i, w);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          keys[j] = order_key(w[j]);
          lane_ties += keys[j] == kept.key;
        }
      }
      int rank = ties + inclusive_scan(lane_ties) - lane_ties;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const bool tie = i < end && keys[j] == kept.key;
        w[j] = i < end && keys[j] > kept.key ? weight(w[j]) : tie && rank < kept.ties ? tie_weight : 0.0f;
        rank += tie;
        if (w[j] != 0) last = i + j;
        lane_sum += w[j];
      }
      const float up_to_here = running + inclusive_scan(lane_sum);
      const unsigned crossed = __ballot_sync(kFullWarp, up_to_here > target && lane_sum > 0);
      if (crossed) {
        const int chosen = __ffs(crossed) - 1;
        float at = up_to_here - lane_sum;
        int token = -1;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          at += w[j];
          // Rounding may keep the lane's own walk just under the target: then its last positive weight is meant.
          if (w[j] > 0 && (token < 0 || !(at - w[j] > target))) token = i + j;
        }
        return __shfl_sync(kFullWarp, token, chosen);
      }
      running = __shfl_sync(kFullWarp, up_to_here, 31);
      ties = __shfl_sync(kFullWarp, rank, 31);
    }
#pragma unroll
    for (int by = 16; by > 0; by /= 2) last = max(last, __shfl_xor_sync(kFullWarp, last, by));
    return last;
  }
};

}  // namespace medusa::cuda
