// Greedy, typical and lossless acceptance of a tree: first each row of logits on its own, then the walk down the tree.
#include "acceptance.h"
#include "isa.h"
#include "threads.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

struct Sequence {
  const VerifyTreeParams& p;
  int b;
  Judgement* judgements;  // [n]

  Sequence(const VerifyTreeParams& params, int index, Judgement* all)
      : p(params), b(index), judgements(all + static_cast<int64_t>(index) * params.n) {}

  const void* row(int node) const {
    return element(p.logits, p.dtype, b * p.logits_batch_stride + node * p.logits_row_stride);
  }

  void judge(int node) const {
    const VerifyMode mode = mode_of(p, b);
    if (mode == VerifyMode::greedy) {
      judgements[node].argmax = argmax(row(node));
    } else if (mode == VerifyMode::typical) {
      auto* spans = scratch_of<SpanSum>(Scratch::piece, spans_of(p.vocab));
      float weights[kSumSpan];
      for (int s = 0; s < spans_of(p.vocab); ++s) {
        spans[s] = weigh_span(row(node), p.dtype, s * kSumSpan, span_length(p.vocab, s), p.temperature[b], weights);
      }
      judgements[node] = judge_typical(p, b, spans);
    }
  }

  // The lowest id of the largest logit.
  int argmax(const void* logits) const {
    constexpr int kSpan = 1024;
    float best = -__builtin_inff();
    int span = 0;
    for (int begin = 0; begin < p.vocab; begin += kSpan) {
      const float here = largest_or_nan(logits, p.dtype, begin, smaller(kSpan, p.vocab - begin));
      if (!exceeds(here, best)) continue;
      best = here;
      span = begin;
    }
    return span + first_place_of(best, p.vocab - span, [&](int i) { return load_one(logits, p.dtype, span + i); });
  }

  const Judgement& judgement(int node) const { return judgements[node]; }
  float logit(int node) const {
    const int parent = p.parents[b * p.parents_batch_stride + node];
    return load_one(row(parent), p.dtype, p.tree_tokens[static_cast<int64_t>(b) * p.n + node]);
  }
  int draw(int node, int depth) const {
    return MEDUSA_ISA::draw(row(node), p.dtype, p.vocab, p.temperature[b], p.top_p[b], p.top_k[b],
                            static_cast<uint64_t>(p.seed[b]), draw_counter(p, b, depth),
                            scratch(Scratch::piece, draw_bytes(p.vocab)));
  }
};

}  // namespace

void verify_tree(const VerifyTreeParams& p) {
  const int rows = p.batch * p.n;
  auto* judgements = scratch_of<Judgement>(Scratch::op, rows);
  parallel_for(rows, 0.1 * rows * p.vocab, [&](int row) { Sequence(p, row / p.n, judgements).judge(row % p.n); });
  parallel_for(p.batch, p.mode ? 2.0 * p.batch * p.vocab : 0, [&](int b) { accept(p, b, Sequence(p, b, judgements)); });
}

}  // namespace medusa::cpu::MEDUSA_ISA
