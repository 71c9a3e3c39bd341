// Greedy, typical and lossless acceptance of a tree: first each row of logits on its own, then the walk down the tree.
#include <math.h>

#include "isa.h"
#include "sampling.h"
#include "threads.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

constexpr int kNodes = 256;

// What a row says about the tokens after it.
struct Judgement {
  int32_t argmax;     // greedy
  float most, log_z;  // typical: ln P[t] = logits[t] / temperature - most - log_z
  float floor;        // a child is accepted above this probability
};

struct Sequence {
  const VerifyTreeParams& p;
  int b;
  VerifyMode mode;
  Judgement* judgements;  // [n]

  Sequence(const VerifyTreeParams& params, int index, Judgement* all)
      : p(params), b(index), judgements(all + static_cast<int64_t>(index) * params.n) {
    mode = p.mode && p.temperature[b] > 0 ? static_cast<VerifyMode>(p.mode[b]) : VerifyMode::greedy;
  }

  const void* row(int node) const {
    return element(p.logits, p.dtype, b * p.logits_batch_stride + node * p.logits_row_stride);
  }
  int token(int node) const { return p.tree_tokens[static_cast<int64_t>(b) * p.n + node]; }
  int parent(int node) const { return p.parents[b * p.parents_batch_stride + node]; }

  void judge(int node) const {
    if (mode == VerifyMode::greedy) {
      judgements[node].argmax = argmax(row(node));
    } else if (mode == VerifyMode::typical) {
      judge_typical(node);
    }
  }

  // The lowest id of the largest logit.
  int argmax(const void* logits) const {
    constexpr int kSpan = 1024;
    float best = -__builtin_inff();
    int span = 0;
    for (int begin = 0; begin < p.vocab; begin += kSpan) {
      Vec most = set(-__builtin_inff());
      const int count = smaller(kSpan, p.vocab - begin);
      for_vectors(count, [&](int i, int lanes) {
        most = max(most, first_lanes(load_part(logits, p.dtype, begin + i, lanes), lanes, -__builtin_inff()));
      });
      if (largest(most) > best) {
        best = largest(most);
        span = begin;
      }
    }
    int id = span;
    while (id < p.vocab - 1 && load_one(logits, p.dtype, id) != best) ++id;
    return id;
  }

  void judge_typical(int node) const {
    Judgement& j = judgements[node];
    float* z = scratch_of<float>(Scratch::piece, 2 * static_cast<size_t>(p.vocab));
    float* weights = z + p.vocab;
    j.most = scale_row(row(node), p.dtype, p.vocab, p.temperature[b], z);
    const Vec most = set(j.most), least = set(-104.f);
    for_vectors(p.vocab, [&](int i, int lanes) {
      // Where exp is 0 the product below must be 0 too, not 0 times infinity.
      const Vec shifted = max(load_part(z + i, lanes) - most, least), weight = exp(shifted);
      store_part(weights + i, weight, lanes);
      store_part(z + i, weight * shifted, lanes);
    });
    double total = 0, products = 0;
    const auto add_to = [](double& to) {
      return [&to](int, int, double part) {
        to += part;
        return false;
      };
    };
    for_spans(weights, p.vocab, add_to(total));
    for_spans(z, p.vocab, add_to(products));
    j.log_z = static_cast<float>(::log(total));
    const double entropy = ::log(total) - products / total;
    j.floor = smaller(p.posterior_threshold[b], p.posterior_alpha[b] * static_cast<float>(::exp(-entropy)));
  }

  int draw_after(int node, int depth) const {
    auto* memory = scratch_of<double>(Scratch::piece, 2048 + static_cast<size_t>(p.vocab));
    const auto counter = static_cast<uint64_t>(p.offset[b]) + static_cast<uint64_t>(depth) + 1;
    return draw(row(node), p.dtype, p.vocab, p.temperature[b], p.top_p[b], p.top_k[b], static_cast<uint64_t>(p.seed[b]),
                counter, memory);
  }

  void accept() const {
    if (mode == VerifyMode::lossless) return accept_lossless();
    int depth[kNodes];
    double score[kNodes];  // typical: sum of ln P along the path
    depth[0] = 0;
    score[0] = 0;
    int last = 0;
    for (int node = 1; node < p.n; ++node) {
      const int up = parent(node);
      depth[node] = -1;
      if (depth[up] < 0) continue;
      const Judgement& j = judgements[up];
      score[node] = 0;
      if (mode == VerifyMode::greedy) {
        if (token(node) != j.argmax) continue;
      } else {
        const float logp = load_one(row(up), p.dtype, token(node)) / p.temperature[b] - j.most - j.log_z;
        if (!(expf(logp) > j.floor)) continue;
        score[node] = score[up] + logp;
      }
      depth[node] = depth[up] + 1;
      if (depth[node] > depth[last] || (depth[node] == depth[last] && score[node] > score[last])) last = node;
    }
    finish(last, depth[last], mode == VerifyMode::greedy ? judgements[last].argmax : draw_after(last, depth[last]));
  }

  void accept_lossless() const {
    int last = 0, depth = 0;
    for (;;) {
      const int drawn = draw_after(last, depth);
      int child = last + 1;
      while (child < p.n && (parent(child) != last || token(child) != drawn)) ++child;
      if (child == p.n) return finish(last, depth, drawn);
      last = child;
      ++depth;
    }
  }

  void finish(int last, int depth, int token) const {
    int32_t* nodes = p.accepted_nodes + static_cast<int64_t>(b) * (p.max_depth + 1);
    for (int i = depth + 1; i <= p.max_depth; ++i) nodes[i] = -1;
    for (int node = last, i = depth; i >= 0; node = parent(node), --i) nodes[i] = node;
    p.accept_length[b] = depth;
    p.next_token[b] = token;
  }
};

}  // namespace

void verify_tree(const VerifyTreeParams& p) {
  const int rows = p.batch * p.n;
  auto* judgements = scratch_of<Judgement>(Scratch::op, rows);
  parallel_for(rows, 0.1 * rows * p.vocab, [&](int row) { Sequence(p, row / p.n, judgements).judge(row % p.n); });
  parallel_for(p.batch, p.mode ? 2.0 * p.batch * p.vocab : 0, [&](int b) { Sequence(p, b, judgements).accept(); });
}

}  // namespace medusa::cpu::MEDUSA_ISA
