// Attention of tree nodes over the prefix and their ancestors.
//
// A row's keys are counted by their rank among the keys that it sees: the prefix, then its ancestors, wherever they
// stand in the tree. Each block of kBlock ranks has a softmax of its own and the blocks are combined in order, so that
// a node's result is, bit for bit, that of plain decoding after the same tokens. Within a block:
//   scores    a sum over head_dim in rising order, keys in lanes (K is transposed on the way in)
//   softmax   lanes counted from the block's first rank
//   values    a sum over the keys in rank order, head_dim in lanes
#include "isa.h"
#include "simd.h"
#include "threads.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

constexpr int kBlock = 256;
constexpr int kRows = 24;  // query rows (node, head of the group) that share a pass over K and V
constexpr int kVectors = kRegisters == 32 ? 4 : 2;
constexpr int kKeys = kVectors * kWidth;  // keys whose scores are summed side by side
constexpr int kSums = 6;                  // rows of them
constexpr int kHead = 256;

// out[r][0 .. V vectors) = q rows times the transposed keys [dim][V vectors]
template <int R, int V>
void score_kernel(const float* q, const float* keys, int dim, float* out, int64_t ld) {
  Vec sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) sums[r][c] = zero();
  }
  for (int d = 0; d < dim; ++d, keys += V * kWidth) {
    Vec k[V];
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) k[c] = load(keys + c * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec a = set(q[r * kHead + d]);
#pragma GCC unroll 4
      for (int c = 0; c < V; ++c) sums[r][c] = fma(k[c], a, sums[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) store(out + r * ld + c * kWidth, sums[r][c]);
  }
}

// out[r][0 .. V vectors) += weights rows times the value rows, in order
template <class T, int R, int V>
void value_kernel(const float* weights, int64_t weights_ld, const T* values, int64_t stride, int count, float* out) {
  Vec sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) sums[r][c] = load(out + r * kHead + c * kWidth);
  }
  for (int j = 0; j < count; ++j, values += stride) {
    Vec v[V];
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) v[c] = load(values + c * kWidth);
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
    for (int c = 0; c < V; ++c) store(out + r * kHead + c * kWidth, sums[r][c]);
  }
}

template <class T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16> = true;

template <int N>
struct Count {
  static constexpr int value = N;
};
// Calls body(Count<R>, row) for blocks of at most kSums rows.
template <int R = kSums, class Body>
inline void for_rows(int row, int rows, const Body& body) {
  for (; rows - row >= R; row += R) body(Count<R>(), row);
  if constexpr (R > 1) {
    if (row < rows) for_rows<R - 1>(row, rows, body);
  }
}

// One sequence's keys and values of one K/V head.
template <class T>
struct Cache {
  const T *k, *v;
  int64_t row_stride;
  int dim;

  // keys [dim][width] of rows first and on, width a multiple of kWidth; those from `count` on are 0 and not read.
  void transposed(int64_t first, int count, int width, float* keys) const {
    for (int group = 0; group < width; group += kWidth) {
      const T* rows = k + (first + group) * row_stride;
      const int there = smaller(kWidth, count - group);
      float* target = keys + group;
      Vec m[kWidth];
      int d = 0;
      if constexpr (is_bf16<T>) {  // two dimensions at once
        for (; d + 2 * kWidth <= dim; d += 2 * kWidth) {
          for (int j = 0; j < kWidth; ++j) m[j] = j < there ? load_pairs(rows + j * row_stride + d) : zero();
          transpose(m);
          for (int i = 0; i < kWidth; ++i) {
            Vec even, odd;
            split_pairs(m[i], even, odd);
            store(target + (d + 2 * i) * width, even);
            store(target + (d + 2 * i + 1) * width, odd);
          }
        }
      }
      for (; d < dim; d += kWidth) {
        for (int j = 0; j < kWidth; ++j) m[j] = j < there ? load_part(rows + j * row_stride + d, dim - d) : zero();
        transpose(m);
        for (int i = 0; i < kWidth && d + i < dim; ++i) store(target + (d + i) * width, m[i]);
      }
    }
  }

  // A head's rows lie too far apart for the processor's own prefetcher.
  void fetch(const T* of, int64_t first, int count) const {
    for (const T* row = of + first * row_stride; count > 0; --count, row += row_stride) {
      for (int d = 0; d < dim; d += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(row + d, 0, 2);
    }
  }

  // out[r] += the rows' weights times value rows first and on
  void add_values(const float* weights, int64_t ld, int rows, int64_t first, int count, float* out) const {
    const T* values = v + first * row_stride;
    for_rows(0, rows, [&](auto n, int row) {
      constexpr int R = decltype(n)::value;
      const float* w = weights + row * ld;
      float* target = out + row * kHead;
      int d = 0;
      for (; d + kVectors * kWidth <= dim; d += kVectors * kWidth) {
        value_kernel<T, R, kVectors>(w, ld, values + d, row_stride, count, target + d);
      }
      for (; d + kWidth <= dim; d += kWidth) value_kernel<T, R, 1>(w, ld, values + d, row_stride, count, target + d);
      if (d == dim) return;
      for (int j = 0; j < count; ++j) {
        const Vec value = load_part(values + j * row_stride + d, dim - d);
        for (int r = 0; r < R; ++r) {
          store(target + r * kHead + d, fma(set(w[r * ld + j]), value, load(target + r * kHead + d)));
        }
      }
    });
  }
};

// What a block of keys contributes to a row: largest score, sum of exp(score - largest), and that sum over values.
struct Partial {
  float most, total;
  float values[kHead];
};

// The query rows [begin, end) of a sequence and K/V head; row = node * group + head of the group.
template <class T>
struct Task {
  const TreeAttentionParams& p;
  int sequence, kv_head, begin, end;
  Cache<T> cache;
  int prefix;

  struct Buffers {
    float q[kRows * kHead];
    float scores[kRows * (kBlock + kKeys)];
    float tree_scores[kRows * (kBlock + kKeys)];
    float keys[kHead * kKeys];
    float values[kRows * kHead];
  };
  static constexpr int kLd = kBlock + kKeys;
  Buffers& buffers;

  Task(const TreeAttentionParams& params, int b, int kv, int first, int last, Buffers& space)
      : p(params), sequence(b), kv_head(kv), begin(first), end(last), buffers(space) {
    const int64_t offset = b * p.kv_batch_stride + kv * p.kv_head_stride;
    cache = {static_cast<const T*>(p.k_cache) + offset, static_cast<const T*>(p.v_cache) + offset, p.kv_row_stride,
             p.head_dim};
    prefix = p.cache_seqlens[b];
    const int group = p.heads / p.kv_heads;
    for (int row = begin; row < end; ++row) {
      const int64_t q = b * p.q_batch_stride + row / group * p.q_row_stride + head_of(row) * p.q_head_stride;
      float* target = buffers.q + (row - begin) * kHead;
      for_vectors(p.head_dim, [&](int d, int lanes) {
        store_part(target + d, load_part(p.q, p.q_dtype, q + d, lanes) * set(p.scale), lanes);
      });
    }
  }

  int node_of(int row) const { return row / (p.heads / p.kv_heads); }
  int head_of(int row) const {
    const int group = p.heads / p.kv_heads;
    return kv_head * group + row % group;
  }

  // Calls body(rank, node) for the tree nodes that `node` sees, in rising order.
  template <class Body>
  void for_ancestors(int node, const Body& body) const {
    const uint64_t* words = p.tree_mask + sequence * p.mask_batch_stride + static_cast<int64_t>(node) * p.words;
    int rank = prefix;
    for (int w = 0; w < p.words; ++w) {
      for (uint64_t bits = words[w]; bits; bits &= bits - 1) body(rank++, 64 * w + __builtin_ctzll(bits));
    }
  }
  int visible(int node) const {
    int count = prefix;
    for_ancestors(node, [&](int, int) { ++count; });
    return count;
  }

  template <int V>
  void scores_of(int64_t first, int count, float* out) const {
    cache.transposed(first, count, V * kWidth, buffers.keys);
    for_rows(0, end - begin, [&](auto n, int row) {
      score_kernel<decltype(n)::value, V>(buffers.q + row * kHead, buffers.keys, p.head_dim, out + row * kLd, kLd);
    });
  }

  void scores(int64_t first, int count, float* out) const {
    int j = 0;
    for (; j + kKeys <= count; j += kKeys) {
      cache.fetch(cache.k, first + j + kKeys, smaller(kKeys, count - j - kKeys));
      cache.fetch(cache.v, first + j, kKeys);
      scores_of<kVectors>(first + j, kKeys, out + j);
    }
    for (; j < count; j += kWidth) scores_of<1>(first + j, smaller(kWidth, count - j), out + j);
  }

  // The contribution of the ranks from block * kBlock on to every row; `partial(row)` says where it goes.
  template <class Target>
  void block(int index, const Target& partial) const {
    const int first = index * kBlock, rows = end - begin;
    const int shared = smaller(kBlock, larger(0, prefix - first));
    const bool tree = first + kBlock > prefix;
    scores(first, shared, buffers.scores);
    if (tree) scores(prefix, p.n, buffers.tree_scores);
    for (int r = 0; r < rows; ++r) {
      float* s = buffers.scores + r * kLd;
      int count = shared;
      if (tree) {
        for_ancestors(node_of(begin + r), [&](int rank, int node) {
          if (rank >= first && rank < first + kBlock) s[count++] = buffers.tree_scores[r * kLd + node];
        });
      }
      Partial& target = *partial(begin + r);
      softmax(s, count, target);
      memset(buffers.values + r * kHead, 0, sizeof(float) * round_up(p.head_dim, kWidth));
    }
    cache.add_values(buffers.scores, kLd, rows, first, shared, buffers.values);
    for (int r = 0; r < rows; ++r) {
      float* values = buffers.values + r * kHead;
      if (tree) add_tree_values(first, begin + r, buffers.scores + r * kLd, values);
      memcpy(partial(begin + r)->values, values, sizeof(float) * p.head_dim);
    }
  }

  // The values of the tree nodes among a block's ranks; neighbours in the tree's order are added in one go.
  void add_tree_values(int first, int row, const float* weights, float* values) const {
    int from = 0, node_from = 0, length = 0;
    const auto flush = [&] { cache.add_values(weights + from - first, kLd, 1, prefix + node_from, length, values); };
    for_ancestors(node_of(row), [&](int rank, int node) {
      if (rank < first || rank >= first + kBlock) return;
      if (length > 0 && node == node_from + length) {
        ++length;
        return;
      }
      flush();
      from = rank;
      node_from = node;
      length = 1;
    });
    flush();
  }

  static void softmax(float* s, int count, Partial& target) {
    for (int i = count; i < round_up(count, kWidth); ++i) s[i] = -__builtin_inff();
    Vec most = set(-__builtin_inff()), total = zero();
    for (int i = 0; i < count; i += kWidth) most = max(most, load(s + i));
    target.most = largest(most);
    const Vec shift = set(target.most);
    for (int i = 0; i < count; i += kWidth) {
      const Vec weight = exp(load(s + i) - shift);
      store(s + i, weight);
      total = total + weight;
    }
    target.total = sum(total);
  }

  // The blocks' contributions, one behind the other, become the row's output.
  void combine(int row, const Partial* partials) const {
    const int blocks = static_cast<int>(ceil_div(visible(node_of(row)), kBlock));
    float most = partials[0].most, total = 0;
    for (int b = 1; b < blocks; ++b) most = larger(most, partials[b].most);
    alignas(64) float out[kHead] = {};
    for (int b = 0; b < blocks; ++b) {
      const float weight = exp(partials[b].most - most);
      total += weight * partials[b].total;
      for_vectors(p.head_dim, [&](int d, int lanes) {
        store(out + d, fma(set(weight), load_part(partials[b].values + d, lanes), load(out + d)));
      });
    }
    const int64_t target =
        ((static_cast<int64_t>(sequence) * p.n + node_of(row)) * p.heads + head_of(row)) * p.head_dim;
    for_vectors(p.head_dim, [&](int d, int lanes) {
      store_part(p.out, p.q_dtype, target + d, load(out + d) * set(1.f / total), lanes);
    });
  }
};

template <class T>
void attend(const TreeAttentionParams& p) {
  const int rows = p.n * (p.heads / p.kv_heads);
  int blocks = 0;
  double keys = 0;
  for (int b = 0; b < p.batch; ++b) {
    blocks = larger(blocks, static_cast<int>(ceil_div(p.cache_seqlens[b] + p.n, kBlock)));
    keys += p.cache_seqlens[b] + p.n;
  }
  // How the work is cut changes no result: rows are independent, and so are blocks until they are combined.
  const int wanted = 3 * num_threads();
  int height = smaller(rows, kRows);
  const auto tasks = [&] { return p.batch * p.kv_heads * static_cast<int>(ceil_div(rows, height)); };
  if (tasks() < wanted && height > kRows / 2) height = static_cast<int>(ceil_div(height, 2));
  const int heights = static_cast<int>(ceil_div(rows, height));
  const int splits = smaller(blocks, static_cast<int>(ceil_div(wanted, tasks())));
  const double nanoseconds = keys * p.kv_heads * p.head_dim * (0.05 + 0.03 * rows);
  const auto task = [&](int index, typename Task<T>::Buffers& space) {
    const int first = index % heights * height, kv_head = index / heights % p.kv_heads;
    return Task<T>(p, index / heights / p.kv_heads, kv_head, first, smaller(rows, first + height), space);
  };
  if (splits == 1) {
    parallel_for(tasks(), nanoseconds, [&](int index) {
      auto& space = *scratch_of<typename Task<T>::Buffers>(Scratch::piece, 1);
      Partial* partials = scratch_of<Partial>(Scratch::tile, static_cast<size_t>(height) * blocks);
      const Task<T> job = task(index, space);
      const auto partial = [&](int row, int block) { return partials + (row - job.begin) * blocks + block; };
      for (int b = 0; b * kBlock < job.prefix + p.n; ++b) job.block(b, [&](int row) { return partial(row, b); });
      for (int row = job.begin; row < job.end; ++row) job.combine(row, partial(row, 0));
    });
    return;
  }
  Partial* partials = scratch_of<Partial>(Scratch::op, static_cast<size_t>(p.batch) * p.kv_heads * rows * blocks);
  const auto partial = [&](const Task<T>& job, int row, int block) {
    return partials + ((static_cast<int64_t>(job.sequence) * p.kv_heads + job.kv_head) * rows + row) * blocks + block;
  };
  parallel_for(tasks() * splits, nanoseconds, [&](int index) {
    const Task<T> job = task(index / splits, *scratch_of<typename Task<T>::Buffers>(Scratch::piece, 1));
    const int part = index % splits;
    for (int b = blocks * part / splits; b < blocks * (part + 1) / splits && b * kBlock < job.prefix + p.n; ++b) {
      job.block(b, [&](int row) { return partial(job, row, b); });
    }
  });
  parallel_for(tasks(), 0.1 * p.batch * p.heads * p.n * blocks * p.head_dim, [&](int index) {
    const Task<T> job = task(index, *scratch_of<typename Task<T>::Buffers>(Scratch::piece, 1));
    for (int row = job.begin; row < job.end; ++row) job.combine(row, partial(job, row, 0));
  });
}

}  // namespace

void tree_attention(const TreeAttentionParams& p) {
  with_type(p.kv_dtype, [&](auto type) { attend<pointee<decltype(type)>>(p); });
}

}  // namespace medusa::cpu::MEDUSA_ISA
