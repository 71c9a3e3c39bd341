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
constexpr int kAlone = 64;  // rows that a head fetches ahead of its own
constexpr int kRows = 24;   // query rows (node, head of the group) that share a pass over K and V
constexpr int kVectors = kRegisters == 32 ? 4 : 2;
constexpr int kKeys = kVectors * kWidth;  // keys whose scores are summed side by side
constexpr int kSums = 6;                  // rows of them
constexpr int kHead = 256;

template <class T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16> = true;
// bf16 is widened in pairs: a load makes a vector of the even and one of the odd dimensions.
template <class T>
constexpr int kPair = is_bf16<T> ? 2 : 1;

// Fetches the next block's rows, all heads of one after the other, at the pace at which the heads of this block use
// theirs; a head that stands alone fetches its own a little ahead. A head's rows alone lie too far apart for the
// processor's own prefetcher: of the 29 GB/s that a Zen 4 core reads in order, head by head leaves 12, and this 20.
template <class T>
struct Ahead {
  const T* row;
  int64_t row_stride, head_stride;
  int heads, dim;
  int due;  // heads' rows used since `row` became the next to fetch

  __attribute__((always_inline)) inline void fetch(int used) {
    for (due += used; due >= heads; due -= heads, row += row_stride) {
      for (int head = 0; head < heads; ++head) {
        const T* at = row + head * head_stride;
        for (int d = 0; d < dim; d += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(at + d, 0, 2);
      }
    }
  }
};

// out[r][0 .. V vectors) = q rows times the transposed keys [dim / kPair][V vectors][kPair]
template <class T, int R, int V>
void score_kernel(const float* q, const float* keys, int dim, float* out, int64_t ld) {
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
    Vec k[V], odd[V];
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) {
      k[c] = load(keys + c * kWidth);
      if (is_bf16<T>) split_pairs(k[c], k[c], odd[c]);
    }
    add(k, d);
    if (is_bf16<T>) add(odd, d + 1);
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
void value_kernel(const float* weights, int64_t weights_ld, const T* values, int64_t stride, int count, Ahead<T>* ahead,
                  float* out) {
  Vec sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) sums[r][c] = load(out + r * kHead + c * kWidth);
  }
  constexpr int kSpan = 8;  // values between fetches
  for (int from = 0; from < count; from += kSpan) {
    const int to = smaller(count, from + kSpan);
    if (ahead) ahead->fetch(to - from);
    for (int j = from; j < to; ++j, values += stride) {
      Vec v[V];
      load_values<V>(values, v);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec a = set(weights[r * weights_ld + j]);
#pragma GCC unroll 4
        for (int c = 0; c < V; ++c) sums[r][c] = fma(a, v[c], sums[r][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) store(out + r * kHead + c * kWidth, sums[r][c]);
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

// One sequence's keys and values of one K/V head.
template <class T>
struct Cache {
  const T *k, *v;
  int64_t row_stride;
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
  void transposed(int64_t first, int count, int width, Ahead<T>* ahead, float* keys) const {
    constexpr int kStep = kPair<T> * kWidth;
    for (int group = 0; group < width; group += kWidth) {
      const T* rows = k + (first + group) * row_stride;
      const int there = smaller(kWidth, count - group);
      float* target = keys + group;
      for (int d = 0; d < dim; d += kStep) {
        Vec m[kWidth];
        if (there == kWidth && dim - d >= kStep) {
          for (int j = 0; j < kWidth; ++j) m[j] = load_key(rows + j * row_stride + d, kStep);
        } else {
          for (int j = 0; j < kWidth; ++j) m[j] = j < there ? load_key(rows + j * row_stride + d, dim - d) : zero();
        }
        if (ahead && d == 0) ahead->fetch(there);
        transpose(m);
        const int steps = smaller(kWidth, static_cast<int>(ceil_div(dim - d, kPair<T>)));
        for (int i = 0; i < steps; ++i, target += width) store(target, m[i]);
      }
    }
  }

  // out[r] += the rows' weights times value rows first and on; paired columns stand as load_values left them.
  void add_values(const float* weights, int64_t ld, int rows, int64_t first, int count, Ahead<T>* ahead,
                  float* out) const {
    const T* values = v + first * row_stride;
    for_rows(0, rows, [&](auto n, int row) {
      constexpr int R = decltype(n)::value;
      const float* w = weights + row * ld;
      float* target = out + row * kHead;
      int d = 0;
      for (; d + kVectors * kWidth <= dim; d += kVectors * kWidth) {
        value_kernel<T, R, kVectors>(w, ld, values + d, row_stride, count, row + d ? nullptr : ahead, target + d);
      }
      for (; d + 2 * kWidth <= dim; d += 2 * kWidth) {
        value_kernel<T, R, 2>(w, ld, values + d, row_stride, count, row + d ? nullptr : ahead, target + d);
      }
      for (; d + kWidth <= dim; d += kWidth) {
        value_kernel<T, R, 1>(w, ld, values + d, row_stride, count, row + d ? nullptr : ahead, target + d);
      }
      if (d == dim) return;
      for (int j = 0; j < count; ++j) {
        const Vec value = load_part(values + j * row_stride + d, dim - d);
        for (int r = 0; r < R; ++r) {
          store(target + r * kHead + d, fma(set(w[r * ld + j]), value, load(target + r * kHead + d)));
        }
      }
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
};

// What a block of keys contributes to a row: largest score, sum of exp(score - largest), and that sum over values.
struct Partial {
  float most, total;
  float values[kHead];
};

// The query rows [begin, end) of a sequence and K/V head; row = node * group + head of the group. The heads
// [first_head, last_head) have their turn at the same blocks.
template <class T>
struct Task {
  const TreeAttentionParams& p;
  int sequence, first_head, last_head, kv_head, begin, end;
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

  Task(const TreeAttentionParams& params, int b, int kv_first, int kv_last, int kv, int first, int last, Buffers& space)
      : p(params),
        sequence(b),
        first_head(kv_first),
        last_head(kv_last),
        kv_head(kv),
        begin(first),
        end(last),
        buffers(space) {
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
      if (p.head_dim % 2) target[p.head_dim] = 0;  // the other half of the last pair
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
  void scores_of(int64_t first, int count, Ahead<T>* ahead, float* out) const {
    cache.transposed(first, count, V * kWidth, ahead, buffers.keys);
    for_rows(0, end - begin, [&](auto n, int row) {
      score_kernel<T, decltype(n)::value, V>(buffers.q + row * kHead, buffers.keys, p.head_dim, out + row * kLd, kLd);
    });
  }

  void scores(int64_t first, int count, Ahead<T>* ahead, float* out) const {
    int j = 0;
    for (; j + kKeys <= count; j += kKeys) scores_of<kVectors>(first + j, kKeys, ahead, out + j);
    for (; j < count; j += kWidth) scores_of<1>(first + j, smaller(kWidth, count - j), ahead, out + j);
  }

  Ahead<T> ahead(const void* of, int first_row) const {
    const int heads = last_head - first_head, before = (kv_head - first_head) * kBlock;
    const int64_t row = first_row + (heads == 1 ? kAlone : kBlock + before / heads);
    const int64_t first = sequence * p.kv_batch_stride + row * p.kv_row_stride;
    return {static_cast<const T*>(of) + first + first_head * p.kv_head_stride,
            p.kv_row_stride,
            p.kv_head_stride,
            heads,
            p.head_dim,
            before % heads};
  }

  // The contribution of the ranks from block * kBlock on to every row; `partial(row)` says where it goes.
  template <class Target>
  void block(int index, const Target& partial) const {
    const int first = index * kBlock, rows = end - begin;
    const int shared = smaller(kBlock, larger(0, prefix - first));
    const bool tree = first + kBlock > prefix;
    Ahead<T> keys = ahead(p.k_cache, first), values = ahead(p.v_cache, first);
    scores(first, shared, &keys, buffers.scores);
    if (tree) scores(prefix, p.n, nullptr, buffers.tree_scores);
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
    cache.add_values(buffers.scores, kLd, rows, first, shared, &values, buffers.values);
    for (int r = 0; r < rows; ++r) {
      float* values = buffers.values + r * kHead;
      if (tree) add_tree_values(first, begin + r, buffers.scores + r * kLd, values);
      memcpy(partial(begin + r)->values, values, sizeof(float) * p.head_dim);
    }
  }

  // The values of the tree nodes among a block's ranks; neighbours in the tree's order are added in one go.
  void add_tree_values(int first, int row, const float* weights, float* values) const {
    int from = 0, node_from = 0, length = 0;
    const auto flush = [&] {
      cache.add_values(weights + from - first, kLd, 1, prefix + node_from, length, nullptr, values);
    };
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
    cache.restore(out);
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
  // How the work is cut changes no result: rows are independent, and so are blocks until they are combined. Blocks with
  // all heads read memory in order; heads apart, and fewer rows, are for what has few blocks.
  const int wanted = 3 * num_threads();
  int height = smaller(rows, kRows);
  const auto heights = [&] { return static_cast<int>(ceil_div(rows, height)); };
  const bool together = p.batch * heights() * blocks >= 2 * num_threads();
  const int parts = together ? 1 : p.kv_heads, part_heads = p.kv_heads / parts;
  const auto tasks = [&] { return p.batch * parts * heights(); };
  if (!together && tasks() < wanted && height > kRows / 2) height = static_cast<int>(ceil_div(height, 2));
  const int splits = smaller(blocks, static_cast<int>(ceil_div(wanted, tasks())));
  const double nanoseconds = keys * p.kv_heads * p.head_dim * (0.05 + 0.03 * rows);

  // A task's contributions lie together: with its buffers where one piece does all of it, else where others find them.
  const int64_t task_partials = static_cast<int64_t>(part_heads) * height * blocks;
  Partial* shared = splits == 1 ? nullptr : scratch_of<Partial>(Scratch::op, tasks() * task_partials);
  // Calls body(job, partial) for each head of a task; partial(row, block) says where a contribution stands.
  const auto for_heads = [&](int index, const auto& body) {
    using Buffers = typename Task<T>::Buffers;
    auto* space = static_cast<Buffers*>(
        scratch(Scratch::piece, sizeof(Buffers) + (shared ? 0 : sizeof(Partial) * task_partials)));
    Partial* partials = shared ? shared + index * task_partials : reinterpret_cast<Partial*>(space + 1);
    const int first = index % heights() * height, b = index / heights() / parts;
    const int first_head = index / heights() % parts * part_heads;
    for (int kv = first_head; kv < first_head + part_heads; ++kv) {
      const Task<T> job(p, b, first_head, first_head + part_heads, kv, first, smaller(rows, first + height), *space);
      body(job, [&](int row, int block) {
        return partials + ((kv - first_head) * int64_t{height} + row - first) * blocks + block;
      });
    }
  };
  const auto combine = [&](int index) {
    for_heads(index, [&](const Task<T>& job, const auto& partial) {
      for (int row = job.begin; row < job.end; ++row) job.combine(row, partial(row, 0));
    });
  };
  parallel_for(tasks() * splits, nanoseconds, [&](int piece) {
    const int index = piece / splits, part = piece % splits;
    for (int block = blocks * part / splits; block < blocks * (part + 1) / splits; ++block) {
      for_heads(index, [&](const Task<T>& job, const auto& partial) {
        if (block * kBlock < job.prefix + p.n) job.block(block, [&](int row) { return partial(row, block); });
      });
    }
    if (splits == 1) combine(index);
  });
  if (splits > 1) parallel_for(tasks(), 0.1 * p.batch * p.heads * p.n * blocks * p.head_dim, combine);
}

}  // namespace

void tree_attention(const TreeAttentionParams& p) {
  with_type(p.kv_dtype, [&](auto type) { attend<pointee<decltype(type)>>(p); });
}

}  // namespace medusa::cpu::MEDUSA_ISA
