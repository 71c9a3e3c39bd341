// The LM head and the acceptance of its rows in one: a piece of the vocabulary leaves each row's largest logit, or its
// share of the softmax, and drops the logits. A draw makes those of the one span anew in which the CDF crosses.
#include "acceptance.h"
#include "isa.h"
#include "matmul.h"
#include "threads.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

constexpr int kLogitsStride = kSumSpan + 16;  // rows a power of two apart would meet in few cache sets
static_assert(kSumSpan % kTile == 0);

struct Peak {
  float most;
  int32_t id;
};

struct Verification {
  const VerifyLmHeadParams& p;
  const VerifyTreeParams& tree;
  Matrix weight;
  Rows rows;              // [batch * n]
  Judgement* judgements;  // [rows]
  SpanSum* sums;          // [rows, spans], of typical and lossless
  Peak* peaks;            // [rows, spans], of greedy
  float* floors;          // [rows]: a lower bound of greedy's largest logit, shared by the threads
  float* child_logits;    // [rows]: typical's, of a node's token at its parent

  Verification(const VerifyLmHeadParams& params)
      : p(params), tree(params.tree), weight{p.lm_head_weight, p.lm_head_format, tree.vocab, p.hidden_size} {
    const int count = tree.batch * tree.n;
    const int64_t spans = spans_of(tree.vocab);
    rows = make_rows(p.hidden, tree.dtype, p.hidden_size, count, p.hidden_size, weight.packed_format());
    const int64_t size = sizeof(Judgement) + spans * (sizeof(SpanSum) + sizeof(Peak)) + 2 * sizeof(float);
    judgements = reinterpret_cast<Judgement*>(scratch_of<char>(Scratch::op, count * size));
    sums = reinterpret_cast<SpanSum*>(judgements + count);
    peaks = reinterpret_cast<Peak*>(sums + count * spans);
    floors = reinterpret_cast<float*>(peaks + count * spans);
    child_logits = floors + count;
    for (int row = 0; row < count; ++row) floors[row] = -__builtin_inff();
  }

  // The logits of `some` rows in one span, rounded to the dtype in which the LM head would have written them.
  void project(const Rows& some, int span, float* logits) const {
    for (int c = 0; c < span_length(tree.vocab, span); c += kTile) {
      multiply_tile(some, weight.packed_format(), weight.tile((span * kSumSpan + c) / kTile), logits + c,
                    kLogitsStride);
    }
    if (tree.dtype == DType::f32) return;
    for (int r = 0; r < some.rows; ++r, logits += kLogitsStride) {
      with_type(tree.dtype, [&](auto* type) {
        for_vectors(span_length(tree.vocab, span), [&](int i, int) {
          pointee<decltype(type)> narrow[kWidth];
          store(narrow, load(logits + i));
          store(logits + i, load(narrow));
        });
      });
    }
  }

  void take_span(int span) const {
    float* logits = scratch_of<float>(Scratch::piece, (rows.rows + int64_t{1}) * kLogitsStride);
    float* weights = logits + static_cast<int64_t>(rows.rows) * kLogitsStride;
    project(rows, span, logits);
    const int first = span * kSumSpan, count = span_length(tree.vocab, span);
    for (int row = 0; row < rows.rows; ++row) {
      const int b = row / tree.n;
      const int64_t at = static_cast<int64_t>(row) * spans_of(tree.vocab) + span;
      const float* own = logits + static_cast<int64_t>(row) * kLogitsStride;
      if (mode_of(tree, b) == VerifyMode::greedy) {
        peaks[at] = peak(own, count, first, floors + row);
        continue;
      }
      sums[at] = weigh_span(own, DType::f32, 0, count, tree.temperature[b], weights);
      const int parent = row % tree.n ? tree.parents[b * tree.parents_batch_stride + row % tree.n] : -1;
      const int token = tree.tree_tokens[row] - first;
      if (parent >= 0 && token >= 0 && token < count) {
        child_logits[row] = logits[(static_cast<int64_t>(b) * tree.n + parent) * kLogitsStride + token];
      }
    }
  }

  // Its id is only looked for when the span may hold the row's largest logit.
  static Peak peak(const float* logits, int count, int first, float* floor) {
    const float here = largest_or_nan(logits, DType::f32, 0, count);
    float least;
    __atomic_load(floor, &least, __ATOMIC_RELAXED);
    if (here < least) return {here, first};
    // Another thread may have raised it meanwhile; the bound stays true whoever writes last.
    if (here >= least) __atomic_store(floor, &here, __ATOMIC_RELAXED);
    return {here, first + first_place_of(here, count, [&](int i) { return logits[i]; })};
  }

  void judge(int row) const {
    const int b = row / tree.n, spans = spans_of(tree.vocab);
    const VerifyMode mode = mode_of(tree, b);
    if (mode == VerifyMode::greedy) {
      const Peak* own = peaks + static_cast<int64_t>(row) * spans;
      int best = 0;
      for (int s = 1; s < spans; ++s) {
        if (exceeds(own[s].most, own[best].most)) best = s;
      }
      judgements[row].argmax = own[best].id;
    } else if (mode == VerifyMode::typical) {
      judgements[row] = judge_typical(tree, b, sums + static_cast<int64_t>(row) * spans);
    }
  }
};

struct Sequence {
  const Verification& v;
  int b;

  int row(int node) const { return b * v.tree.n + node; }
  const Judgement& judgement(int node) const { return v.judgements[row(node)]; }
  float logit(int node) const { return v.child_logits[row(node)]; }
  int draw(int node, int depth) const {
    const VerifyTreeParams& tree = v.tree;
    const float u = philox_uniform(static_cast<uint64_t>(tree.seed[b]), draw_counter(tree, b, depth));
    const SpanSum* sums = v.sums + static_cast<int64_t>(row(node)) * spans_of(tree.vocab);
    return find_token(sums, tree.vocab, u, [&](int span) {
      float* logits = scratch_of<float>(Scratch::piece, 2 * kLogitsStride);
      float* weights = logits + kLogitsStride;
      v.project(v.rows.part(row(node), 1), span, logits);
      weigh_span(logits, DType::f32, 0, span_length(tree.vocab, span), tree.temperature[b], weights);
      return weights;
    });
  }
};

}  // namespace

void verify_lm_head(const VerifyLmHeadParams& p) {
  const Verification v(p);
  const VerifyTreeParams& tree = p.tree;
  const int spans = spans_of(tree.vocab);
  const double products = 1.0 * v.rows.rows * p.hidden_size * tree.vocab;
  parallel_for(spans, 0.06 * v.weight.bytes() + 0.01 * products, [&](int span) { v.take_span(span); });
  parallel_for(v.rows.rows, 10.0 * v.rows.rows * spans, [&](int row) { v.judge(row); });
  const double drawn = 0.06 * v.weight.bytes() / spans * tree.batch;
  parallel_for(tree.batch, tree.mode ? drawn : 0, [&](int b) { accept(tree, b, Sequence{v, b}); });
}

}  // namespace medusa::cpu::MEDUSA_ISA
