// The walk down the tree, whatever the nodes' judgements were made from.
#pragma once
#include <math.h>

#include "sampling.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

// What a row of logits says about the tokens after it.
struct Judgement {
  int32_t argmax;  // greedy
  float most;      // typical: ln P[t] = logits[t] / temperature - most - log_z, in double: P and floor are rounded once
  float floor;     // a child is accepted above this probability
  double log_z;
};

// Greedy's order: NaN is larger than any number, as in torch.argmax.
inline bool exceeds(float a, float b) { return a > b || (a != a && b == b); }

inline float largest_or_nan(const void* logits, DType dtype, int64_t first, int count) {
  Vec most = set(-__builtin_inff()), nan = zero();
  for_vectors(count, [&](int i, int lanes) {
    const Vec x = first_lanes(load_part(logits, dtype, first + i, lanes), lanes, -__builtin_inff());
    most = max(x, most);
    nan = note_nan(nan, x);
  });
  const float seen = sum(nan);
  return seen == seen ? largest(most) : seen;
}

// Where `value`, as largest_or_nan found it, stands first among logit(0 .. count - 1).
template <class Logit>
inline int first_place_of(float value, int count, const Logit& logit) {
  int i = 0;
  while (i < count - 1 && exceeds(value, logit(i))) ++i;
  return i;
}

inline VerifyMode mode_of(const VerifyTreeParams& p, int b) {
  return p.mode && p.temperature[b] > 0 ? static_cast<VerifyMode>(p.mode[b]) : VerifyMode::greedy;
}

inline Judgement judge_typical(const VerifyTreeParams& p, int b, const SpanSum* spans) {
  const int count = spans_of(p.vocab);
  Judgement j = {};
  j.most = most_of(spans, count);
  double total = 0, products = 0;
  for (int s = 0; s < count; ++s) {
    const double scale = scale_of(spans[s], j.most);
    if (!(scale > 0)) continue;
    total += scale * spans[s].total;
    products += scale * (spans[s].products + static_cast<double>(spans[s].most - j.most) * spans[s].total);
  }
  j.log_z = ::log(total);
  const double entropy = j.log_z - products / total;
  j.floor = smaller(p.posterior_threshold[b], p.posterior_alpha[b] * static_cast<float>(::exp(-entropy)));
  return j;
}

inline uint64_t draw_counter(const VerifyTreeParams& p, int b, int depth) {
  return static_cast<uint64_t>(p.offset[b]) + static_cast<uint64_t>(depth) + 1;
}

// Sequence b's path and the token after it. `rows` has judgement(node), logit(node): that of the node's token at its
// parent, and draw(node, depth).
template <class Rows>
inline void accept(const VerifyTreeParams& p, int b, const Rows& rows) {
  const auto token = [&](int node) { return p.tree_tokens[static_cast<int64_t>(b) * p.n + node]; };
  const auto parent = [&](int node) { return p.parents[b * p.parents_batch_stride + node]; };
  const auto finish = [&](int last, int depth, int next) {
    int32_t* nodes = p.accepted_nodes + static_cast<int64_t>(b) * (p.max_depth + 1);
    for (int i = depth + 1; i <= p.max_depth; ++i) nodes[i] = -1;
    for (int node = last, i = depth; i >= 0; node = parent(node), --i) nodes[i] = node;
    p.accept_length[b] = depth;
    p.next_token[b] = next;
  };

  const VerifyMode mode = mode_of(p, b);
  if (mode == VerifyMode::lossless) {
    int last = 0;
    for (int depth = 0;; ++depth) {
      const int drawn = rows.draw(last, depth);
      int child = last + 1;
      while (child < p.n && (parent(child) != last || token(child) != drawn)) ++child;
      if (child == p.n) return finish(last, depth, drawn);
      last = child;
    }
  }

  int depth[kMaxNodes];
  double score[kMaxNodes];  // typical: sum of ln P along the path
  depth[0] = 0;
  score[0] = 0;
  int last = 0;
  for (int node = 1; node < p.n; ++node) {
    const int up = parent(node);
    depth[node] = -1;
    if (depth[up] < 0) continue;
    const Judgement& j = rows.judgement(up);
    score[node] = 0;
    if (mode == VerifyMode::greedy) {
      if (token(node) != j.argmax) continue;
    } else {
      const double logp = static_cast<double>(rows.logit(node) / p.temperature[b]) - j.most - j.log_z;
      if (!(static_cast<float>(::exp(logp)) > j.floor)) continue;
      score[node] = score[up] + logp;
    }
    depth[node] = depth[up] + 1;
    if (depth[node] > depth[last] || (depth[node] == depth[last] && score[node] > score[last])) last = node;
  }
  finish(last, depth[last], mode == VerifyMode::greedy ? rows.judgement(last).argmax : rows.draw(last, depth[last]));
}

}  // namespace
}  // namespace medusa::cpu::MEDUSA_ISA
