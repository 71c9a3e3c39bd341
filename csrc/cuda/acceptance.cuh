// From what each node's row of logits says to the accepted path: the block of a node leaves its token and, for typical
// acceptance, ln P of its children; the last of a sequence's blocks picks the path.
#pragma once
#include "cuda/slices.cuh"

namespace medusa::cuda {

constexpr float kRefused = -INFINITY;  // as ln P of a child: not accepted

// What the blocks leave for the last one. A sequence's own part, or all of them.
struct Said {
  int32_t* token;     // [batch, n]: what the model says after each node
  float* child_logp;  // [batch, n]: ln P of the node's token at its parent, or kRefused

  static constexpr int64_t kBytes = sizeof(int32_t) + sizeof(float);  // of a node

  static Said at(void* memory, int64_t nodes) {
    auto* tokens = static_cast<int32_t*>(memory);
    return {tokens, reinterpret_cast<float*>(tokens + nodes)};
  }
  __device__ __forceinline__ Said of(int b, int n) const {
    return {token + static_cast<int64_t>(b) * n, child_logp + static_cast<int64_t>(b) * n};
  }
};

__device__ __forceinline__ VerifyMode mode_of(const VerifyTreeParams& p, int b) {
  // Temperature 0 is greedy in every mode.
  return p.mode && p.temperature[b] != 0 ? static_cast<VerifyMode>(p.mode[b]) : VerifyMode::greedy;
}

// A sequence's tree, and room to walk it in. Member functions are called by all of the block's `Threads`.
template <int Threads>
struct TreeShared {
  int32_t parents[kMaxNodes], tokens[kMaxNodes], said[kMaxNodes];
  float logp[kMaxNodes];
  double total[kMaxNodes];
  int depth[kMaxNodes];
  bool accepted[kMaxNodes], last;

  // A barrier must follow.
  __device__ void load(const VerifyTreeParams& p, int b) {
    for (int i = threadIdx.x; i < p.n; i += Threads) {
      parents[i] = p.parents[b * p.parents_batch_stride + i];
      tokens[i] = p.tree_tokens[static_cast<int64_t>(b) * p.n + i];
    }
  }

  __device__ int depth_of(int node) const {
    int depth = 0;
    for (int at = node; at > 0; at = parents[at]) ++depth;
    return depth;
  }

  // Typical acceptance (Medusa, section 2.3.1) of this node's children. logit_of(child): of its token, at this node.
  template <class LogitOf>
  __device__ void judge_children(const VerifyTreeParams& p, int b, int node, const RowSums& row, float* child_logp,
                                 LogitOf logit_of) const {
    // P = exp(x) / mass and exp(-H) = exp(weighted / mass) / mass, without a logarithm in between: a P that equals the
    // floor must not exceed it by rounding.
    const float likeness = expf(row.weighted / row.mass) / row.mass;
    const float floor = fminf(p.posterior_threshold[b], p.posterior_alpha[b] * likeness);
    for (int child = threadIdx.x; child < p.n; child += Threads) {
      if (parents[child] != node) continue;
      const float x = shifted(logit_of(child), row.top(), p.temperature[b]);
      child_logp[child] = expf(x) / row.mass > floor ? x - logf(row.mass) : kRefused;
    }
  }

  // The last block of sequence b: which path, and the token after it.
  __device__ void choose_path(const VerifyTreeParams& p, int b, VerifyMode mode, const Said& from) {
    const auto each_node = [&](auto f) {
      for (int node = threadIdx.x; node < p.n; node += Threads) f(node);
      __syncthreads();
    };
    each_node([&](int node) {
      said[node] = load_l2(from.token + node);
      logp[node] = mode == VerifyMode::typical && node ? load_l2(from.child_logp + node) : 0.0f;
    });
    int32_t* path = p.accepted_nodes + b * (p.max_depth + int64_t{1});
    for (int i = threadIdx.x; i <= p.max_depth; i += Threads) path[i] = -1;
    each_node([&](int node) {
      const int parent = parents[node];
      bool right = node == 0 || (mode == VerifyMode::typical ? logp[node] != kRefused : tokens[node] == said[parent]);
      if (mode == VerifyMode::lossless && right) {  // of siblings with the same token the first is meant
        for (int other = parent + 1; other < node; ++other) {
          if (parents[other] == parent && tokens[other] == tokens[node]) right = false;
        }
      }
      accepted[node] = right;
    });
    each_node([&](int node) {
      int length = 0;
      double sum = 0;  // of few terms: exact enough that equal paths tie
      for (int at = node; at > 0; at = parents[at], ++length) {
        sum += logp[at];
        if (!accepted[at]) {
          length = -1;
          break;
        }
      }
      depth[node] = length;
      total[node] = sum;
    });
    if (threadIdx.x >= 32) return;

    int best = 0;  // the root is always there
    const auto take_better = [&](int other) {
      const bool deeper = depth[other] > depth[best];
      const bool likelier = depth[other] == depth[best] && total[other] > total[best];
      const bool first = depth[other] == depth[best] && total[other] == total[best] && other < best;
      if (deeper || likelier || first) best = other;
    };
    for (int other = threadIdx.x; other < p.n; other += 32) take_better(other);
#pragma unroll
    for (int by = 16; by > 0; by /= 2) take_better(__shfl_xor_sync(kFullWarp, best, by));
    if (threadIdx.x == 0) {
      p.accept_length[b] = depth[best];
      p.next_token[b] = said[best];
      for (int at = best, i = depth[best]; i >= 0; at = parents[at], --i) path[i] = at;
    }
  }
};

}  // namespace medusa::cuda
