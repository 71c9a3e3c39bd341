// A row of logits as slices of 128 ids, each summed by itself, relative to its own largest logit. So the LM head can
// leave its slices' sums and drop the logits (verify_lm_head), and what reads a whole row (verify_tree) comes to the
// same sums and draws the same token. But for the generator, every function is called by all lanes of one warp
// together.
#pragma once
#include "cuda/common.cuh"

namespace medusa::cuda {

// A multiple of 2^-24 in [0, 1) from Philox4x32-10 (Salmon et al., 2011); key and counter are 64-bit, low word first.
__device__ inline float philox_uniform(uint64_t seed, uint64_t counter) {
  uint32_t x[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint32_t low0 = 0xD2511F53u * x[0], high0 = __umulhi(0xD2511F53u, x[0]);
    const uint32_t low1 = 0xCD9E8D57u * x[2], high1 = __umulhi(0xCD9E8D57u, x[2]);
    x[0] = high1 ^ x[1] ^ key[0];
    x[1] = low1;
    x[2] = high0 ^ x[3] ^ key[1];
    x[3] = low0;
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return static_cast<float>(x[0] >> 8) * 0x1p-24f;
}

constexpr int kSliceIds = 128, kLaneIds = kSliceIds / 32;  // a lane has neighbouring ids

struct alignas(16) Slice {
  uint64_t best;   // rank_key of its largest logit
  float mass;      // sum of exp(x), x = (logit - largest logit) / temperature
  float weighted;  // sum of exp(x) * x
};

__device__ __forceinline__ float shifted(float logit, float top, float temperature) {
  return logit / temperature - top / temperature;
}

// `logit` holds the lane's ids, from first_id + kLaneIds * lane on; -inf past the vocabulary. Greedy needs no sums.
__device__ __forceinline__ Slice slice_of(const float (&logit)[kLaneIds], int first_id, bool sums, float temperature) {
  const int lane = threadIdx.x % 32;
  Slice made = {0, 0, 0};
#pragma unroll
  for (int j = 0; j < kLaneIds; ++j) made.best = max(made.best, rank_key(logit[j], first_id + kLaneIds * lane + j));
#pragma unroll
  for (int by = 16; by > 0; by /= 2) made.best = max(made.best, __shfl_xor_sync(kFullWarp, made.best, by));
  if (!sums) return made;
  const float top = rank_value(made.best);
#pragma unroll
  for (int j = 0; j < kLaneIds; ++j) {
    if (logit[j] == -INFINITY) continue;
    const float x = shifted(logit[j], top, temperature), w = expf(x);
    made.mass += w;
    made.weighted += w > 0 ? w * x : 0.0f;
  }
  made.mass = warp_sum(made.mass);
  made.weighted = warp_sum(made.weighted);
  return made;
}

// A row's slices together.
struct RowSums {
  uint64_t best;
  float mass, weighted;  // relative to the row's largest logit

  __device__ __forceinline__ float top() const { return rank_value(best); }
};

// Where the running mass exceeds u times the whole: in which slice, and the mass before it.
struct Crossing {
  int slice;
  float before, target;
};

struct RowSlices {
  const Slice* slices;
  int count;
  float temperature;

  // Each lane adds up a run of neighbouring slices, so that ids rise from lane to lane.
  __device__ __forceinline__ int run() const { return static_cast<int>(ceil_div(count, 32)); }

  __device__ __forceinline__ float scale(const Slice& slice, float top) const {
    const float largest = rank_value(slice.best);
    return largest == -INFINITY ? 0.0f : expf(shifted(largest, top, temperature));
  }

  __device__ __forceinline__ uint64_t best() const {
    uint64_t best = 0;
    for (int s = threadIdx.x % 32; s < count; s += 32) best = max(best, slices[s].best);
#pragma unroll
    for (int by = 16; by > 0; by /= 2) best = max(best, __shfl_xor_sync(kFullWarp, best, by));
    return best;
  }

  __device__ RowSums sums() const {
    RowSums row = {best(), 0, 0};
    const int lane = threadIdx.x % 32, begin = min(lane * run(), count), end = min(begin + run(), count);
    for (int s = begin; s < end; ++s) {
      const Slice slice = slices[s];
      const float by = scale(slice, row.top());
      if (by == 0) continue;
      row.mass += by * slice.mass;
      row.weighted += by * (slice.weighted + shifted(rank_value(slice.best), row.top(), temperature) * slice.mass);
    }
    row.mass = warp_sum(row.mass);
    row.weighted = warp_sum(row.weighted);
    return row;
  }

  __device__ Crossing crossing(float top, float u) const {
    const int lane = threadIdx.x % 32, begin = min(lane * run(), count), end = min(begin + run(), count);
    float own = 0;
    for (int s = begin; s < end; ++s) own += scale(slices[s], top) * slices[s].mass;
    const float running = inclusive_scan(own);
    Crossing found = {0, 0, u * __shfl_sync(kFullWarp, running, 31)};
    const unsigned crossed = __ballot_sync(kFullWarp, running > found.target && own > 0);
    const unsigned nonzero = __ballot_sync(kFullWarp, own != 0);
    const int chosen = crossed ? __ffs(crossed) - 1 : 31 - __clz(nonzero);
    float before = __shfl_sync(kFullWarp, running, chosen) - __shfl_sync(kFullWarp, own, chosen);
    const int chosen_begin = __shfl_sync(kFullWarp, begin, chosen), chosen_end = __shfl_sync(kFullWarp, end, chosen);
    for (int first = chosen_begin; first < chosen_end; first += 32) {
      const int s = first + lane;
      const float part = s < chosen_end ? scale(slices[s], top) * slices[s].mass : 0.0f;
      const float up_to_here = before + inclusive_scan(part);
      const unsigned here = __ballot_sync(kFullWarp, up_to_here > found.target && part > 0);
      const unsigned some = __ballot_sync(kFullWarp, part != 0);
      // Rounding may keep the walk just under the target: then the last slice with mass is meant.
      if (some) {
        const int source = here ? __ffs(here) - 1 : 31 - __clz(some);
        found.slice = first + source;
        found.before = __shfl_sync(kFullWarp, up_to_here, source) - __shfl_sync(kFullWarp, part, source);
      }
      if (here) break;
      before = __shfl_sync(kFullWarp, up_to_here, 31);
    }
    return found;
  }

  // The token: the first id of the crossing's slice at which the running mass exceeds the target, else its last whose
  // weight is not 0: a token of the vocabulary even where the weights are NaN. `logit` as in slice_of.
  __device__ int find(const Crossing& crossing, const float (&logit)[kLaneIds], float top) const {
    const int lane = threadIdx.x % 32;
    float w[kLaneIds], lane_sum = 0;
    int token = -1;
#pragma unroll
    for (int j = 0; j < kLaneIds; ++j) {
      w[j] = logit[j] == -INFINITY ? 0.0f : expf(shifted(logit[j], top, temperature));
      lane_sum += w[j];
    }
    const float up_to_here = crossing.before + inclusive_scan(lane_sum);
    const unsigned crossed = __ballot_sync(kFullWarp, up_to_here > crossing.target && lane_sum > 0);
    const unsigned some = __ballot_sync(kFullWarp, lane_sum != 0);
    float at = up_to_here - lane_sum;
#pragma unroll
    for (int j = 0; j < kLaneIds; ++j) {
      // As above: the lane's own walk may stay just under the target.
      if (w[j] != 0 && (token < 0 || !(at > crossing.target))) token = kLaneIds * lane + j;
      at += w[j];
    }
    const int chosen = crossed ? __ffs(crossed) - 1 : 31 - __clz(some);
    return crossing.slice * kSliceIds + max(__shfl_sync(kFullWarp, token, chosen), 0);  // every logit may be -inf
  }
};

}  // namespace medusa::cuda
