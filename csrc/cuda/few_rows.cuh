// weight · x for few rows x: bound by reading the weight once. The weight is the tensor cores' left operand, 16
// features at a time, so that eight rows of x cost no more than one.
#pragma once
#include "cuda/common.cuh"

namespace medusa::cuda {

constexpr int kFewRowsWarps = 8, kFewRowsThreads = 32 * kFewRowsWarps;
constexpr int kFewRowsBlocksPerSm = 2;  // leaves 128 registers: loads in flight matter more than warps

// Rows of several heads, each head with `per_head` of them; one head's rows may be another's (head_stride 0).
template <class X>
struct Rows {
  const X* first;  // [heads, per_head, in_features], in_features contiguous
  int64_t head_stride, row_stride;
  int per_head, count;  // count: of all heads

  __device__ __forceinline__ const X* at(int row) const {
    return first + row / per_head * head_stride + row % per_head * row_stride;
  }
};

template <class W>
struct Weight {
  const W* first;  // [out_features, in_features], contiguous
  int out_features, in_features;
};

// A tile gives the block weight · x for kFeatures features and kRows rows, in shared memory. SplitK: the warps that
// share a feature, each with every SplitK-th run of 32 of its sum. A sum's order depends on in_features alone, never on
// the rows.
template <class T, int RowTiles, int SplitK>
struct TensorCoreTile {
  using X = T;
  using W = T;
  static constexpr int kFeatures = 16 * kFewRowsWarps / SplitK, kRows = 8 * RowTiles;
  static constexpr int kInFlight = RowTiles <= 2 ? 4 : RowTiles == 4 ? 2 : 1;  // runs loaded before they are used

  struct Shared {
    float sums[SplitK][kFeatures][kRows + 1];  // one more, or a column's writers would meet in few banks
  };

  static __device__ void multiply(const Weight<T>& weight, int feature, const Rows<T>& x, int row, Shared& s) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp % SplitK, group = warp / SplitK * 16;
    const int size = weight.in_features;
    // Rows past the end repeat the last one: they cost nothing and nobody looks at them.
    const auto weight_row = [&](int i) {
      return weight.first + static_cast<int64_t>(min(feature + group + i, weight.out_features - 1)) * size;
    };
    const T* low = weight_row(lane / 4);
    const T* high = weight_row(lane / 4 + 8);
    const T* rows[RowTiles];
#pragma unroll
    for (int t = 0; t < RowTiles; ++t) rows[t] = x.at(min(row + t * 8 + lane / 4, x.count - 1));

    float sum[RowTiles][4] = {};
    for (int first = part * 32; first < size; first += SplitK * 32 * kInFlight) {
      uint4 a[kInFlight][2], b[kInFlight][RowTiles];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        // A lane's eight neighbours stand for the places 2c, 2c + 1, 2c + 8 and 2c + 9 of two products: both operands
        // are permuted alike, so 16-byte loads need no shuffle.
        const int k = first + i * SplitK * 32 + lane % 4 * 8;
        const uint4 zero = {0, 0, 0, 0};
        const bool inside = k < size;
        a[i][0] = inside ? load_streaming(low + k) : zero;
        a[i][1] = inside ? load_streaming(high + k) : zero;
#pragma unroll
        for (int t = 0; t < RowTiles; ++t) b[i][t] = inside ? load_cached(rows[t] + k) : zero;
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const uint32_t a0[4] = {a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y};
        const uint32_t a1[4] = {a[i][0].z, a[i][1].z, a[i][0].w, a[i][1].w};
#pragma unroll
        for (int t = 0; t < RowTiles; ++t) {
          mma_16816<T>(sum[t], a0, b[i][t].x, b[i][t].y);
          mma_16816<T>(sum[t], a1, b[i][t].z, b[i][t].w);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < RowTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s.sums[part][group + lane / 4 + i / 2 * 8][t * 8 + lane % 4 * 2 + i % 2] = sum[t][i];
      }
    }
    __syncthreads();
  }

  static __device__ __forceinline__ float result(const Shared& s, int feature, int row) {
    float sum = 0;
#pragma unroll
    for (int part = 0; part < SplitK; ++part) sum += s.sums[part][feature][row];
    return sum;
  }
};

// For fp32, mixed dtypes and odd sizes: a thread per number.
template <class AnyX, class AnyW, int Features>
struct PlainTile {
  using X = AnyX;
  using W = AnyW;
  static constexpr int kFeatures = Features, kRows = 8;

  struct Shared {
    float sums[kFeatures][kRows];
  };

  static __device__ void multiply(const Weight<W>& weight, int feature, const Rows<X>& x, int row, Shared& s) {
    constexpr int kParts = 8;  // sums side by side: less rounding than one long one, and no waiting for it
    for (int i = threadIdx.x; i < kFeatures * kRows; i += kFewRowsThreads) {
      const int f = feature + i / kRows, r = row + i % kRows;
      if (f >= weight.out_features || r >= x.count) continue;
      const W* w = weight.first + static_cast<int64_t>(f) * weight.in_features;
      const X* v = x.at(r);
      float part[kParts] = {};
      for (int k = 0; k < weight.in_features; k += kParts) {
#pragma unroll
        for (int j = 0; j < kParts; ++j) {
          if (k + j < weight.in_features) part[j] += to_float(w[k + j]) * to_float(v[k + j]);
        }
      }
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kParts; ++j) sum += part[j];
      s.sums[i / kRows][i % kRows] = sum;
    }
    __syncthreads();
  }

  static __device__ __forceinline__ float result(const Shared& s, int feature, int row) { return s.sums[feature][row]; }
};

// Before wait_for_previous_kernel(): sets the block's memory to work on the first lines of its weight rows, one line a
// thread, while the previous kernel ends. Correct even if that kernel writes the weight; see prefetch_l2.
template <class Tile>
__device__ __forceinline__ void prefetch_weight(const Weight<typename Tile::W>& weight, int feature) {
  constexpr int kLines = kFewRowsThreads / Tile::kFeatures, kLine = 128 / sizeof(typename Tile::W);
  const int row = feature + threadIdx.x / kLines, k = threadIdx.x % kLines * kLine;
  if (row >= weight.out_features || k >= weight.in_features) return;
  prefetch_l2(weight.first + static_cast<int64_t>(row) * weight.in_features + k);
}

template <class T>
struct TypeName {
  using type = T;
};

// f(TypeName<tile>) with the narrowest tensor-core tile that takes `rows` at once, or the widest there is.
template <class T, int SplitK, class F>
int with_tensor_core_tile(int rows, F f) {
  if (rows <= 8) return f(TypeName<TensorCoreTile<T, 1, SplitK>>{});
  if (rows <= 16) return f(TypeName<TensorCoreTile<T, 2, SplitK>>{});
  if (rows <= 32) return f(TypeName<TensorCoreTile<T, 4, SplitK>>{});
  return f(TypeName<TensorCoreTile<T, 8, SplitK>>{});
}

}  // namespace medusa::cuda
