// The keys and values of a sequence as tree_attention reads them: scores of query rows against keys, and weighted sums
// of values.
#pragma once
#include "simd.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

constexpr int kHead = kMaxHeadDim;  // the distance between two query rows
constexpr int kVectors = kRegisters == 32 ? 4 : 2;
constexpr int kKeys = kVectors * kWidth;  // keys whose scores are summed side by side
constexpr int kSums = 6;                  // rows of them
// Keys or values that all rows and heads take before the next, so that L1 keeps them
constexpr int kSpan = kKeys < 32 ? 32 : kKeys;

template <class T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16> = true;
// bf16 is widened in pairs: a load makes a vector of the even and one of the odd dimensions.
template <class T>
constexpr int kPair = is_bf16<T> ? 2 : 1;

// Fetches the rows that are read next, a byte for every byte read now: asked for in bursts they would fill the core's
// queue of misses and hold up its arithmetic, and a head's rows alone lie too far apart for the core's own prefetcher.
class Ahead {
 public:
  Ahead() : Ahead(nullptr, 0, 0, 0) {}
  // `rows` rows of `run` bytes, `stride` bytes from one to the next
  Ahead(const void* data, int rows, int64_t run, int64_t stride)
      : at_(static_cast<const char*>(data)), rows_(rows), run_(run), jump_(stride - run), left_(run) {}

  // Rows like these, to be fetched behind them
  Ahead then(const Ahead& next) const {
    if (done()) return next;
    Ahead both = *this;
    both.next_ = next.at_;
    both.next_rows_ = next.rows_;
    return both;
  }

  bool done() const { return rows_ <= 0; }

  // The next `bytes`, in whole lines
  __attribute__((always_inline)) inline void fetch(int bytes) {
    for (; bytes > 0 && !done(); bytes -= kLine) {
      __builtin_prefetch(at_, 0, 2);
      at_ += kLine;
      left_ -= kLine;
      if (left_ <= 0) turn();
    }
  }

 private:
  static constexpr int kLine = 64;

  void turn() {
    at_ += jump_;
    left_ += run_;
    if (--rows_ > 0) return;
    at_ = next_;
    rows_ = next_rows_;
    next_rows_ = 0;
  }

  const char *at_, *next_ = nullptr;
  int rows_, next_rows_ = 0;
  int64_t run_, jump_, left_;  // bytes of a row, from its end to the next row, and to the end of this row
};

// out[r][0 .. V vectors) = q rows times the transposed keys [dim / kPair][V vectors][kPair]
template <class T, int R, int V>
void score_kernel(const float* q, const float* keys, int dim, Ahead* ahead, float* out, int64_t ld) {
  Vec sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) sums[r][c] = zero();
  }
  const auto add = [&](const Vec(&k)[V], int d) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec a = set(q[r * kHead + d]);
#pragma GCC unroll 4
      for (int c = 0; c < V; ++c) sums[r][c] = fma(k[c], a, sums[r][c]);
    }
  };
  for (int d = 0; d < dim; d += kPair<T>, keys += V * kWidth) {
    if (ahead) ahead->fetch(V * kWidth * kPair<T> * static_cast<int>(sizeof(T)));
    Vec k[V], other[V];
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) {
      k[c] = load(keys + c * kWidth);
      if (is_bf16<T>) split_pairs(k[c], k[c], other[c]);
    }
    add(k, d);
    if (!is_bf16<T>) continue;
    if (kRegisters == 16) __asm__ volatile("" ::: "memory");  // GCC would keep both halves, and spill sums for it
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) split_pairs(load(keys + c * kWidth), other[c], k[c]);
    add(k, d + 1);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) store(out + r * ld + c * kWidth, sums[r][c]);
  }
}

// V vectors of a value row; those of bf16 as its pairs fall apart: even, odd, even, odd.
template <int V, class T>
inline void load_values(const T* p, Vec (&v)[V]) {
  if constexpr (is_bf16<T> && V > 1) {
#pragma GCC unroll 4
    for (int c = 0; c < V; c += 2) split_pairs(load_pairs(p + c * kWidth), v[c], v[c + 1]);
  } else {
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) v[c] = load(p + c * kWidth);
  }
}

// out[r][0 .. V vectors) += weights rows times the value rows, in order
template <class T, int R, int V>
void value_kernel(const float* weights, int64_t weights_ld, const T* values, int64_t stride, int count, Ahead* ahead,
                  float* out, int64_t ld) {
  Vec sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) sums[r][c] = load(out + r * ld + c * kWidth);
  }
  for (int j = 0; j < count; ++j, values += stride) {
    if (ahead) ahead->fetch(V * kWidth * static_cast<int>(sizeof(T)));
    Vec v[V];
    load_values<V>(values, v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec a = set(weights[r * weights_ld + j]);
#pragma GCC unroll 4
      for (int c = 0; c < V; ++c) sums[r][c] = fma(a, v[c], sums[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) store(out + r * ld + c * kWidth, sums[r][c]);
  }
}

// Calls body(Count<R>, row) for blocks of at most kSums rows.
template <int R = kSums, class Body>
inline void for_rows(int row, int rows, const Body& body) {
  for (; rows - row >= R; row += R) body(Count<R>(), row);
  if constexpr (R > 1) {
    if (row < rows) for_rows<R - 1>(row, rows, body);
  }
}

// The rows [*, head_dim] of one K/V head; those of keys or those of values.
template <class T>
struct HeadRows {
  const T* data;
  int64_t stride;
  int dim;

  // kPair * kWidth elements of a row, those past `count` 0 and not read
  static Vec load_key(const T* p, int count) {
    if constexpr (is_bf16<T>) {
      if (count >= 2 * kWidth) return load_pairs(p);
      bf16 lanes[2 * kWidth] = {};
      memcpy(lanes, p, count * sizeof(bf16));
      return load_pairs(lanes);
    } else {
      return load_part(p, count);
    }
  }

  // keys [dim / kPair][width][kPair] of rows first and on, width a multiple of kWidth; those from `count` on are 0 and
  // not read.
  void transposed(int64_t first, int count, int width, float* keys) const {
    constexpr int kStep = kPair<T> * kWidth;
    for (int group = 0; group < width; group += kWidth) {
      const T* rows = data + (first + group) * stride;
      const int there = smaller(kWidth, count - group);
      float* target = keys + group;
      for (int d = 0; d < dim; d += kStep) {
        Vec m[kWidth];
        if (there == kWidth && dim - d >= kStep) {
          for (int j = 0; j < kWidth; ++j) m[j] = load_key(rows + j * stride + d, kStep);
        } else {
          for (int j = 0; j < kWidth; ++j) m[j] = j < there ? load_key(rows + j * stride + d, dim - d) : zero();
        }
        transpose(m);
        const int steps = smaller(kWidth, static_cast<int>(ceil_div(dim - d, kPair<T>)));
        for (int i = 0; i < steps; ++i, target += width) store(target, m[i]);
      }
    }
  }

  // out[r][j] = q row r times key row first + j; whole vectors are written. `keys` is space for kHead * kKeys floats.
  void scores(const float* q, int rows, int64_t first, int count, Ahead* ahead, float* keys, float* out,
              int64_t ld) const {
    const auto side_by_side = [&](auto vectors, int j) {
      constexpr int V = decltype(vectors)::value;
      transposed(first + j, smaller(V * kWidth, count - j), V * kWidth, keys);
      for_rows(0, rows, [&](auto n, int row) {
        constexpr int R = decltype(n)::value;
        score_kernel<T, R, V>(q + row * kHead, keys, dim, row ? nullptr : ahead, out + row * ld + j, ld);
      });
    };
    int j = 0;
    for (; j + kKeys <= count; j += kKeys) side_by_side(Count<kVectors>(), j);
    for (; j < count; j += kWidth) side_by_side(Count<1>(), j);
  }

  // out[r] += the rows' weights times value rows first and on; paired columns stand as load_values left them.
  void add_values(const float* weights, int64_t weights_ld, int rows, int64_t first, int count, Ahead* ahead,
                  float* out, int64_t ld) const {
    for_rows(0, rows, [&](auto n, int row) {
      add_some<decltype(n)::value>(weights + row * weights_ld, weights_ld, data + first * stride, count,
                                   row ? nullptr : ahead, out + row * ld, ld);
    });
  }

  // Puts a row of add_values in the order of the dimensions.
  void restore(float* out) const {
    if constexpr (is_bf16<T>) {
      for (int d = 0; d + 2 * kWidth <= dim; d += 2 * kWidth) {
        Vec low, high;
        merge_pairs(load(out + d), load(out + d + kWidth), low, high);
        store(out + d, low);
        store(out + d + kWidth, high);
      }
    }
  }

 private:
  template <int R>
  void add_some(const float* weights, int64_t weights_ld, const T* values, int count, Ahead* ahead, float* out,
                int64_t ld) const {
    constexpr int kMost = kRegisters == 32 || R <= kSums / 2 ? 4 : 2;
    int d = 0;
    const auto add = [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      for (; d + V * kWidth <= dim; d += V * kWidth) {
        value_kernel<T, R, V>(weights, weights_ld, values + d, stride, count, ahead, out + d, ld);
      }
    };
    add(Count<kMost>());
    add(Count<2>());
    add(Count<1>());
    if (d == dim) return;
    for (int j = 0; j < count; ++j) {
      const Vec value = load_part(values + j * stride + d, dim - d);
      for (int r = 0; r < R; ++r) {
        float* target = out + r * ld + d;
        store(target, fma(set(weights[r * weights_ld + j]), value, load(target)));
      }
    }
  }
};

}  // namespace
}  // namespace medusa::cpu::MEDUSA_ISA
