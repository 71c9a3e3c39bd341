// Attention of tree nodes over the prefix and their ancestors.
//
// A row's keys are counted by their rank among the keys that it sees: the prefix, then its ancestors, wherever they
// stand in the tree. Each block of kBlock ranks has a softmax of its own and the blocks are combined in order, so that
// a node's result is, bit for bit, that of plain decoding after the same tokens. Within a block:
//   scores    a sum over head_dim in rising order, keys in lanes (K is transposed on the way in)
//   softmax   lanes counted from the block's first rank
//   values    a sum over the keys in rank order, head_dim in lanes
#include "isa.h"
#include "kv_cache.h"
#include "simd.h"
#include "threads.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

constexpr int kBlock = 128;
constexpr int kRows = 24;        // query rows (node, head of the group) that share a pass over K and V
constexpr int kUnderWay = 8192;  // bytes of K or V that are asked for before they are used

// What a block of keys contributes to a row: largest score, sum of exp(score - largest), and that sum over values.
struct Partial {
  float* at;

  float& most() const { return at[0]; }
  float& total() const { return at[1]; }
  float* values() const { return at + kWidth; }  // written in whole vectors

  // Floats from one to the next
  static int64_t size(int head_dim) { return kWidth + round_up(head_dim, kWidth); }
};

// The query rows [begin, end) of the K/V heads [first_head, last_head) of a sequence; row = node * group + head of the
// group.
template <class T>
class Task {
 public:
  Task(const TreeAttentionParams& params, int b, int first_head, int last_head, int first, int last, int blocks,
       float* partials)
      : p_(params),
        sequence_(b),
        first_head_(first_head),
        last_head_(last_head),
        begin_(first),
        end_(last),
        blocks_(blocks),
        prefix_(params.cache_seqlens[b]),
        partials_(partials) {}

  // Floats of all contributions
  static int64_t partials_space(int heads, int rows, int blocks, int head_dim) {
    return int64_t{heads} * rows * blocks * Partial::size(head_dim);
  }

  // Floats that `block` works on: q, scores of the prefix and of the tree, transposed keys.
  static int64_t space(int heads, int rows, int n) {
    return int64_t{heads} * rows * (kHead + kBlock) + rows * tree_ld(n) + kHead * kKeys;
  }

  // To be called before the first block: takes the space, sends for the block's first keys and reads q meanwhile.
  void prepare(float* space, int index) {
    for (Ahead keys = ahead(p_.k_cache, index * kBlock, 0, distance()); !keys.done();) keys.fetch(64);
    const int rows = end_ - begin_, heads = last_head_ - first_head_;
    q_ = space;
    scores_ = q_ + int64_t{heads} * rows * kHead;
    tree_scores_ = scores_ + int64_t{heads} * rows * kBlock;
    keys_ = tree_scores_ + rows * tree_ld(p_.n);
    with_type(p_.q_dtype, [&](auto type) {
      const auto* all = static_cast<const pointee<decltype(type)>*>(p_.q) + sequence_ * p_.q_batch_stride;
      for (int kv = first_head_; kv < last_head_; ++kv) {
        for (int row = begin_; row < end_; ++row) {
          const auto* q = all + node_of(row) * p_.q_row_stride + head_of(kv, row) * p_.q_head_stride;
          float* target = q_of(kv) + int64_t{row - begin_} * kHead;
          for_vectors(p_.head_dim, [&](int d, int lanes) {
            store_part(target + d, load_part(q + d, lanes) * set(p_.scale), lanes);
          });
          if (p_.head_dim % 2) target[p_.head_dim] = 0;  // the other half of the last pair
        }
      }
    });
  }

  // The contribution of the ranks from index * kBlock on to every row
  void block(int index) const {
    const int first = index * kBlock, rows = end_ - begin_;
    if (first >= prefix_ + p_.n) return;
    const int shared = smaller(kBlock, larger(0, prefix_ - first));
    const Nodes tree = nodes_among(first);
    Ahead next = ahead(p_.k_cache, first, distance(), kBlock).then(ahead(p_.v_cache, first, 0, distance()));
    for (int from = 0; from < shared; from += kSpan) {
      for (int kv = first_head_; kv < last_head_; ++kv) {
        rows_of(p_.k_cache, kv)
            .scores(q_of(kv), rows, first + from, smaller(kSpan, shared - from), &next, keys_, scores_of(kv) + from,
                    kBlock);
      }
    }
    for (int kv = first_head_; kv < last_head_; ++kv) {
      if (tree.count > 0) {
        rows_of(p_.k_cache, kv)
            .scores(q_of(kv), rows, prefix_ + tree.first, tree.count, nullptr, keys_, tree_scores_, tree_ld(p_.n));
      }
      for (int r = 0; r < rows; ++r) {
        float* s = scores_of(kv) + r * kBlock;
        int count = shared;
        for_ancestors(begin_ + r, first,
                      [&](int, int node) { s[count++] = tree_scores_[r * tree_ld(p_.n) + node - tree.first]; });
        softmax(s, count, partial(kv, index, r));
        memset(partial(kv, index, r).values(), 0, sizeof(float) * p_.head_dim);
      }
    }
    next = ahead(p_.v_cache, first, distance(), kBlock).then(ahead(p_.k_cache, first + kBlock, 0, distance()));
    for (int from = 0; from < shared; from += kSpan) {
      for (int kv = first_head_; kv < last_head_; ++kv) {
        rows_of(p_.v_cache, kv)
            .add_values(scores_of(kv) + from, kBlock, rows, first + from, smaller(kSpan, shared - from), &next,
                        partial(kv, index, 0).values(), Partial::size(p_.head_dim));
      }
    }
    if (tree.count == 0) return;
    for (int kv = first_head_; kv < last_head_; ++kv) {
      for (int r = 0; r < rows; ++r) {
        add_tree_values(rows_of(p_.v_cache, kv), first, r, scores_of(kv) + r * kBlock, partial(kv, index, r).values());
      }
    }
  }

  // The blocks' contributions, one behind the other, become the rows' output.
  void combine() const {
    for (int kv = first_head_; kv < last_head_; ++kv) {
      for (int row = begin_; row < end_; ++row) combine(kv, row);
    }
  }

 private:
  static int64_t tree_ld(int n) { return round_up(n, kWidth); }
  int node_of(int row) const { return row / (p_.heads / p_.kv_heads); }
  int head_of(int kv, int row) const {
    const int group = p_.heads / p_.kv_heads;
    return kv * group + row % group;
  }
  float* q_of(int kv) const { return q_ + int64_t{kv - first_head_} * (end_ - begin_) * kHead; }
  float* scores_of(int kv) const { return scores_ + int64_t{kv - first_head_} * (end_ - begin_) * kBlock; }
  // A block's contribution to row begin_ + r
  Partial partial(int kv, int block, int r) const {
    const int64_t index = (int64_t{kv - first_head_} * blocks_ + block) * (end_ - begin_) + r;
    return {partials_ + index * Partial::size(p_.head_dim)};
  }
  HeadRows<T> rows_of(const void* cache, int kv) const {
    const int64_t offset = sequence_ * p_.kv_batch_stride + kv * p_.kv_head_stride;
    return {static_cast<const T*>(cache) + offset, p_.kv_row_stride, p_.head_dim};
  }

  // How many rows before their use K and V are sent for. Within a span the heads take turns.
  int distance() const {
    const int row = (last_head_ - first_head_) * p_.head_dim * static_cast<int>(sizeof(T));
    return smaller(kBlock, larger(kSpan, kUnderWay / row));
  }

  // The rows [from, to) of the block that begins with `first`, as far as the prefix goes, all heads of a row. Heads
  // that lie apart are left to the core's own prefetcher.
  Ahead ahead(const void* cache, int first, int from, int to) const {
    const int heads = last_head_ - first_head_;
    if (heads > 1 && p_.kv_head_stride != p_.head_dim) return {};
    const int64_t run = int64_t{heads} * p_.head_dim * sizeof(T), stride = p_.kv_row_stride * int64_t{sizeof(T)};
    const T* at = rows_of(cache, first_head_).data + int64_t{first + from} * p_.kv_row_stride;
    return Ahead(at, smaller(to, prefix_ - first) - from, run, stride);
  }

  const uint64_t* mask_of(int row) const {
    return p_.tree_mask + sequence_ * p_.mask_batch_stride + int64_t{node_of(row)} * p_.words;
  }
  // Calls body(rank, node) for the tree nodes that a row sees among the ranks of the block from `first` on.
  template <class Body>
  void for_ancestors(int row, int first, const Body& body) const {
    const uint64_t* words = mask_of(row);
    int rank = prefix_;
    for (int w = 0; w < p_.words && rank < first + kBlock; ++w) {
      for (uint64_t bits = words[w]; bits && rank < first + kBlock; bits &= bits - 1, ++rank) {
        if (rank >= first) body(rank, 64 * w + __builtin_ctzll(bits));
      }
    }
  }
  int visible(int row) const {
    const uint64_t* words = mask_of(row);
    int count = prefix_;
    for (int w = 0; w < p_.words; ++w) count += __builtin_popcountll(words[w]);
    return count;
  }

  // The tree nodes [first, first + count) are all that any row sees in a block.
  struct Nodes {
    int first, count;
  };
  Nodes nodes_among(int first) const {
    int least = p_.n, most = -1;
    for (int row = begin_; row < end_; ++row) {
      for_ancestors(row, first, [&](int, int node) {
        least = smaller(least, node);
        most = larger(most, node);
      });
    }
    return {least, larger(0, most - least + 1)};
  }

  // The values of the tree nodes among a block's ranks; neighbours in the tree's order are added in one go.
  void add_tree_values(const HeadRows<T>& values, int first, int r, const float* weights, float* out) const {
    int from = 0, node_from = 0, length = 0;
    const auto flush = [&] {
      if (length == 0) return;
      values.add_values(weights + from - first, kBlock, 1, prefix_ + node_from, length, nullptr, out, 0);
    };
    for_ancestors(begin_ + r, first, [&](int rank, int node) {
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

  static void softmax(float* s, int count, Partial target) {
    for (int i = count; i < round_up(count, kWidth); ++i) s[i] = -__builtin_inff();
    Vec most = set(-__builtin_inff()), total = zero();
    for (int i = 0; i < count; i += kWidth) most = max(most, load(s + i));
    target.most() = largest(most);
    // Where every score is -inf the block weighs nothing; -inf less -inf would be NaN.
    const Vec shift = set(target.most() == -__builtin_inff() ? 0.f : target.most());
    for (int i = 0; i < count; i += kWidth) {
      const Vec weight = exp(load(s + i) - shift);
      store(s + i, weight);
      total = total + weight;
    }
    target.total() = sum(total);
  }

  void combine(int kv, int row) const {
    const int blocks = static_cast<int>(ceil_div(visible(row), kBlock));
    const auto of_block = [&](int b) { return partial(kv, b, row - begin_); };
    float most = of_block(0).most(), total = 0;
    for (int b = 1; b < blocks; ++b) most = larger(most, of_block(b).most());
    alignas(64) float out[kHead] = {};
    for (int b = 0; b < blocks; ++b) {
      const float weight = exp(of_block(b).most() - most);
      total += weight * of_block(b).total();
      for_vectors(p_.head_dim, [&](int d, int lanes) {
        store(out + d, fma(set(weight), load_part(of_block(b).values() + d, lanes), load(out + d)));
      });
    }
    rows_of(p_.v_cache, kv).restore(out);
    const int64_t target = ((int64_t{sequence_} * p_.n + node_of(row)) * p_.heads + head_of(kv, row)) * p_.head_dim;
    for_vectors(p_.head_dim, [&](int d, int lanes) {
      store_part(p_.out, p_.q_dtype, target + d, load(out + d) * set(1.f / total), lanes);
    });
  }

  const TreeAttentionParams& p_;
  const int sequence_, first_head_, last_head_, begin_, end_, blocks_, prefix_;
  float* const partials_;
  float *q_, *scores_, *tree_scores_, *keys_;
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
  // all heads read memory in order; heads apart, and fewer rows, are for what has few blocks: where more than a fifth
  // of the threads' rounds over whole blocks would be idle, a last round less than a quarter full not counted.
  const int wanted = 3 * num_threads();
  int height = smaller(rows, kRows);
  const auto heights = [&] { return static_cast<int>(ceil_div(rows, height)); };
  const double units = heights() * keys / kBlock, threads = num_threads();
  const bool together = threads == 1 || static_cast<int>(units / threads + 0.75) * threads <= 1.25 * units;
  const int parts = together ? 1 : p.kv_heads, part_heads = p.kv_heads / parts;
  const auto tasks = [&] { return p.batch * parts * heights(); };
  if (!together && tasks() < wanted && height > kRows / 2) height = static_cast<int>(ceil_div(height, 2));
  const int splits = smaller(blocks, static_cast<int>(ceil_div(wanted, tasks())));
  const double nanoseconds = keys * p.kv_heads * p.head_dim * (0.05 + 0.03 * rows);

  // A task's contributions lie together: behind its buffers where one piece does all of it, else where others find
  // them.
  const int64_t space = Task<T>::space(part_heads, height, p.n);
  const int64_t partials_space = Task<T>::partials_space(part_heads, height, blocks, p.head_dim);
  float* shared = splits == 1 ? nullptr : scratch_of<float>(Scratch::op, tasks() * partials_space);
  const auto task_of = [&](int index, float* partials) {
    const int first = index % heights() * height, b = index / heights() / parts;
    const int first_head = index / heights() % parts * part_heads;
    return Task<T>(p, b, first_head, first_head + part_heads, first, smaller(rows, first + height), blocks, partials);
  };
  parallel_for(tasks() * splits, nanoseconds, [&](int piece) {
    const int index = piece / splits, part = piece % splits;
    auto* floats = scratch_of<float>(Scratch::piece, space + (shared ? 0 : partials_space));
    Task<T> task = task_of(index, shared ? shared + index * partials_space : floats + space);
    task.prepare(floats, blocks * part / splits);
    for (int block = blocks * part / splits; block < blocks * (part + 1) / splits; ++block) task.block(block);
    if (splits == 1) task.combine();
  });
  if (splits == 1) return;
  parallel_for(tasks(), 0.1 * p.batch * p.heads * p.n * blocks * p.head_dim,
               [&](int index) { task_of(index, shared + index * partials_space).combine(); });
}

}  // namespace

void tree_attention(const TreeAttentionParams& p) {
  with_type(p.kv_dtype, [&](auto type) { attend<pointee<decltype(type)>>(p); });
}

}  // namespace medusa::cpu::MEDUSA_ISA
