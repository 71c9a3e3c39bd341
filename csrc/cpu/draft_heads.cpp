// The Medusa heads: residual SiLU blocks on one hidden row, an LM head and its top-k. A piece of the LM head keeps only
// its best candidates and its share of the log-sum-exp, so the logits never leave the cache.
#include <math.h>
#include <stdlib.h>

#include "isa.h"
#include "matmul.h"
#include "threads.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

constexpr int kSpan = 4 * kTile;  // LM head columns in a piece
constexpr int kMostKept = 64;     // above this top_k the logits are stored and sorted

struct Candidate {
  float score;
  int32_t id;
};

// NaN is below every number.
inline bool better(Candidate a, Candidate b) {
  const bool a_is_nan = a.score != a.score, b_is_nan = b.score != b.score;
  if (a_is_nan != b_is_nan) return b_is_nan;
  return a.score > b.score || (!(a.score < b.score) && a.id < b.id);
}

int compare(const void* a, const void* b) {
  const Candidate x = *static_cast<const Candidate*>(a), y = *static_cast<const Candidate*>(b);
  return better(y, x) - better(x, y);
}

// The best `most` candidates seen, best first.
struct Best {
  Candidate* list;
  int most;
  int count = 0;

  void offer(Candidate c) {
    if (count == most && !better(c, list[most - 1])) return;
    int i = count < most ? count++ : most - 1;
    for (; i > 0 && better(c, list[i - 1]); --i) list[i] = list[i - 1];
    list[i] = c;
  }
};

// What one piece of the vocabulary says about a row.
struct Share {
  float most, total;  // largest logit, sum of exp(logit - most)
  int32_t count;      // candidates kept
};

struct Buffers {
  float *x, *next;        // [rows, hidden], rows = heads * batch
  Share* shares;          // [rows, pieces]
  Candidate* candidates;  // [rows, pieces, top_k], or all of [rows, vocab] when top_k is large
  float* floors;          // [rows]: a lower bound of the row's top_k-th logit, shared by the threads

  Buffers(const DraftHeadsParams& p, int64_t pieces) {
    const int64_t rows = static_cast<int64_t>(p.heads) * p.batch;
    const int64_t kept = p.top_k > kMostKept ? p.vocab : pieces * p.top_k;
    char* memory = scratch_of<char>(Scratch::op, rows * (8 * p.hidden_size + 12 * pieces + 8 * kept + 4));
    x = reinterpret_cast<float*>(memory);
    next = x + rows * p.hidden_size;
    candidates = reinterpret_cast<Candidate*>(next + rows * p.hidden_size);
    shares = reinterpret_cast<Share*>(candidates + rows * kept);
    floors = reinterpret_cast<float*>(shares + rows * pieces);
  }
};

// x + silu(W x + b) of one layer for every head, from `x` to `next`.
void apply_layer(const DraftHeadsParams& p, int layer, const float* x, float* next) {
  const Matrix shape = {nullptr, p.block_format, p.hidden_size, p.hidden_size};
  const Rows rows = make_rows(x, DType::f32, p.hidden_size, p.heads * p.batch, p.hidden_size, shape.packed_format());
  const int tiles = shape.tiles();
  parallel_for(p.heads * tiles, 0.06 * p.heads * shape.bytes(), [&](int piece) {
    const int head = piece / tiles, tile = piece % tiles, first = tile * kTile;
    const int64_t block = static_cast<int64_t>(head) * p.layers + layer;
    Matrix weight = shape;
    weight.data = static_cast<const char*>(p.block_weight) + block * shape.bytes();
    float* sums = scratch_of<float>(Scratch::piece, static_cast<size_t>(p.batch) * kTile);
    multiply_tile(rows.part(head * p.batch, p.batch), shape.packed_format(), weight.tile(tile), sums, kTile);
    for (int b = 0; b < p.batch; ++b, sums += kTile) {
      const int64_t row = (static_cast<int64_t>(head) * p.batch + b) * p.hidden_size + first;
      for_vectors(smaller(kTile, p.hidden_size - first), [&](int i, int lanes) {
        Vec y = load(sums + i);
        if (p.block_bias) y = y + load_part(p.block_bias, p.bias_dtype, block * p.hidden_size + first + i, lanes);
        store_part(next + row + i, load_part(x + row + i, lanes) + silu(y), lanes);
      });
    }
  });
}

Share sum_of_exp(const float* logits, int count) {
  Vec most = set(-__builtin_inff());
  for_vectors(count, [&](int i, int lanes) {
    most = max(most, first_lanes(load_part(logits + i, lanes), lanes, -__builtin_inff()));
  });
  const Vec shift = max(set(largest(most)), set(-3e38f));  // -inf less -inf would be NaN
  Vec total = zero();
  for_vectors(count, [&](int i, int lanes) {
    total = total + first_lanes(exp(load_part(logits + i, lanes) - shift), lanes, 0.f);
  });
  return {largest(most), sum(total), 0};
}

// Keeps the best of `count` logits whose ids begin at `first`.
int keep_best(const float* logits, int count, int first, int top_k, float* floor, Candidate* kept) {
  Best best = {kept, top_k};
  float least;
  __atomic_load(floor, &least, __ATOMIC_RELAXED);
  for_vectors(count, [&](int i, int lanes) {
    if (lanes == kWidth && !any_at_least(load(logits + i), set(least))) return;
    for (int j = 0; j < lanes; ++j) {
      if (logits[i + j] >= least) best.offer({logits[i + j], first + i + j});
    }
    if (best.count == top_k) least = larger(least, kept[top_k - 1].score);
  });
  // Another thread may have raised it meanwhile; the bound stays true whoever writes last.
  if (best.count == top_k) __atomic_store(floor, &least, __ATOMIC_RELAXED);
  return best.count;
}

void finish_row(const DraftHeadsParams& p, const Buffers& buffers, int row, int pieces) {
  const int head = row / p.batch, b = row % p.batch;
  const Share* shares = buffers.shares + static_cast<int64_t>(row) * pieces;
  float most = shares[0].most, total = 0;
  for (int i = 1; i < pieces; ++i) most = larger(most, shares[i].most);
  for (int i = 0; i < pieces; ++i) total += shares[i].total * exp(shares[i].most - most);
  const float log_total = logf(total);

  Candidate storage[kMostKept];
  Best best = {storage, p.top_k};
  if (p.top_k > kMostKept) {
    best = {buffers.candidates + static_cast<int64_t>(row) * p.vocab, p.vocab, p.vocab};
    qsort(best.list, p.vocab, sizeof(Candidate), compare);
  } else {
    const Candidate* kept = buffers.candidates + static_cast<int64_t>(row) * pieces * p.top_k;
    for (int i = 0; i < pieces; ++i) {
      for (int j = 0; j < shares[i].count; ++j) best.offer(kept[static_cast<int64_t>(i) * p.top_k + j]);
    }
  }
  const int64_t out = (static_cast<int64_t>(b) * p.heads + head) * p.top_k;
  for (int i = 0; i < p.top_k; ++i) {
    // Fewer candidates than top_k: the logits held NaN.
    const Candidate chosen = i < best.count ? best.list[i] : Candidate{__builtin_nanf(""), 0};
    p.draft_tokens[out + i] = p.token_map ? p.token_map[chosen.id] : chosen.id;
    p.logprobs[out + i] = (chosen.score - most) - log_total;
  }
}

}  // namespace

void draft_heads(const DraftHeadsParams& p) {
  const int pieces = static_cast<int>(ceil_div(p.vocab, kSpan));
  const int rows = p.heads * p.batch;
  Buffers buffers(p, pieces);
  for (int row = 0; row < rows; ++row) {
    const int64_t from = row % p.batch * p.hidden_row_stride;
    for_vectors(p.hidden_size, [&](int i, int lanes) {
      store_part(buffers.x + static_cast<int64_t>(row) * p.hidden_size + i,
                 load_part(p.hidden, p.dtype, from + i, lanes), lanes);
    });
    buffers.floors[row] = -__builtin_inff();
  }
  for (int layer = 0; layer < p.layers; ++layer) {
    apply_layer(p, layer, buffers.x, buffers.next);
    float* kept = buffers.x;
    buffers.x = buffers.next;
    buffers.next = kept;
  }

  const Matrix shape = {p.lm_head_weight, p.lm_head_format, p.vocab, p.hidden_size};
  const Rows all = make_rows(buffers.x, DType::f32, p.hidden_size, rows, p.hidden_size, shape.packed_format());
  const int matrices = p.own_lm_heads ? p.heads : 1, height = rows / matrices;
  parallel_for(matrices * pieces, 0.06 * matrices * shape.bytes(), [&](int index) {
    const int piece = index % pieces, first = piece * kSpan, count = smaller(kSpan, p.vocab - first);
    Matrix weight = shape;
    weight.data = static_cast<const char*>(shape.data) + index / pieces * shape.bytes();
    const int top = index / pieces * height;
    float* logits = scratch_of<float>(Scratch::piece, static_cast<size_t>(height) * kSpan);
    for (int c = 0; c < count; c += kTile) {
      multiply_tile(all.part(top, height), shape.packed_format(), weight.tile((first + c) / kTile), logits + c, kSpan);
    }
    for (int row = top; row < top + height; ++row, logits += kSpan) {
      Share& share = buffers.shares[static_cast<int64_t>(row) * pieces + piece];
      share = sum_of_exp(logits, count);
      if (p.top_k > kMostKept) {
        Candidate* stored = buffers.candidates + static_cast<int64_t>(row) * p.vocab + first;
        for (int i = 0; i < count; ++i) stored[i] = {logits[i], first + i};
      } else {
        Candidate* kept = buffers.candidates + (static_cast<int64_t>(row) * pieces + piece) * p.top_k;
        share.count = keep_best(logits, count, first, p.top_k, buffers.floors + row, kept);
      }
    }
  });
  parallel_for(rows, 10.0 * rows * pieces, [&](int row) { finish_row(p, buffers, row, pieces); });
}

}  // namespace medusa::cpu::MEDUSA_ISA
