// verify_tree in one launch. One block per (sequence, node) settles what that node says: its token (argmax or draw; a
// draw depends on the node's depth alone, so all nodes can draw at once) and, for typical acceptance, ln P of its
// children. The last of a sequence's blocks then picks the path.
#include "cuda/common.cuh"
#include "cuda/ops.h"
#include "cuda/row_sampling.cuh"

namespace medusa::cuda {
namespace {

constexpr int kMaxNodes = 256;
constexpr float kRefused = -INFINITY;  // as ln P of a child: not accepted

// What the blocks leave for the last one.
struct Said {
  int32_t* token;     // [batch, n]: what the model says after each node
  float* child_logp;  // [batch, n]: ln P of the node's token at its parent, or kRefused
};

struct Shared {
  RowShared row;
  int32_t parents[kMaxNodes], tokens[kMaxNodes], said[kMaxNodes];
  float logp[kMaxNodes];
  double total[kMaxNodes];
  int depth[kMaxNodes];
  bool accepted[kMaxNodes], last;
};

__device__ __forceinline__ VerifyMode mode_of(const VerifyTreeParams& p, int b) {
  // Temperature 0 is greedy in every mode.
  return p.mode && p.temperature[b] != 0 ? static_cast<VerifyMode>(p.mode[b]) : VerifyMode::greedy;
}

// Typical acceptance (Medusa, section 2.3.1) of this node's children.
template <class T, int N>
__device__ void judge_children(const VerifyTreeParams& p, const Row<T, N>& row, int b, int node, const Shared& s,
                               float* child_logp) {
  float mass = 0, weighted = 0;
  row.each([&](float v, int) {
    const float x = row.shifted(v), w = expf(x);
    mass += w;
    weighted += w > 0 ? w * x : 0.0f;
  });
  mass = row.sum(mass);
  weighted = row.sum(weighted);
  const float log_mass = logf(mass), entropy = log_mass - weighted / mass;
  const float floor = fminf(p.posterior_threshold[b], p.posterior_alpha[b] * expf(-entropy));
  for (int child = threadIdx.x; child < p.n; child += kRowThreads) {
    if (s.parents[child] != node) continue;
    const float logp = row.shifted(to_float(row.logits[s.tokens[child]])) - log_mass;
    child_logp[child] = expf(logp) > floor ? logp : kRefused;
  }
}

// The last block of sequence b: which path, and the token after it.
__device__ void choose_path(const VerifyTreeParams& p, int b, VerifyMode mode, Shared& s, Said said) {
  const auto each_node = [&](auto f) {
    for (int node = threadIdx.x; node < p.n; node += kRowThreads) f(node);
    __syncthreads();
  };
  each_node([&](int node) {
    s.said[node] = load_l2(said.token + node);
    s.logp[node] = mode == VerifyMode::typical && node ? load_l2(said.child_logp + node) : 0.0f;
  });
  int32_t* path = p.accepted_nodes + b * (p.max_depth + int64_t{1});
  for (int i = threadIdx.x; i <= p.max_depth; i += kRowThreads) path[i] = -1;
  each_node([&](int node) {
    const int parent = s.parents[node];
    bool accepted =
        node == 0 || (mode == VerifyMode::typical ? s.logp[node] != kRefused : s.tokens[node] == s.said[parent]);
    if (mode == VerifyMode::lossless && accepted) {  // of siblings with the same token the first is meant
      for (int other = parent + 1; other < node; ++other) {
        if (s.parents[other] == parent && s.tokens[other] == s.tokens[node]) accepted = false;
      }
    }
    s.accepted[node] = accepted;
  });
  each_node([&](int node) {
    int depth = 0;
    double total = 0;  // of few terms: exact enough that equal paths tie
    for (int at = node; at > 0; at = s.parents[at], ++depth) {
      total += s.logp[at];
      if (!s.accepted[at]) {
        depth = -1;
        break;
      }
    }
    s.depth[node] = depth;
    s.total[node] = total;
  });
  if (threadIdx.x >= 32) return;

  int best = 0;  // the root is always there
  const auto take_better = [&](int other) {
    const bool deeper = s.depth[other] > s.depth[best];
    const bool likelier = s.depth[other] == s.depth[best] && s.total[other] > s.total[best];
    const bool first = s.depth[other] == s.depth[best] && s.total[other] == s.total[best] && other < best;
    if (deeper || likelier || first) best = other;
  };
  for (int other = threadIdx.x; other < p.n; other += 32) take_better(other);
#pragma unroll
  for (int by = 16; by > 0; by /= 2) take_better(__shfl_xor_sync(kFullWarp, best, by));
  if (threadIdx.x == 0) {
    p.accept_length[b] = s.depth[best];
    p.next_token[b] = s.said[best];
    for (int at = best, depth = s.depth[best]; depth >= 0; at = s.parents[at], --depth) path[depth] = at;
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads) verify_tree_kernel(VerifyTreeParams p, Said said, uint32_t* arrived) {
  Shared& s = shared_memory<Shared>();
  const int b = blockIdx.x / p.n, node = blockIdx.x % p.n;
  const VerifyMode mode = mode_of(p, b);
  said.token += static_cast<int64_t>(b) * p.n;
  said.child_logp += static_cast<int64_t>(b) * p.n;
  for (int i = threadIdx.x; i < p.n; i += kRowThreads) {
    s.parents[i] = p.parents[b * p.parents_batch_stride + i];
    s.tokens[i] = p.tree_tokens[static_cast<int64_t>(b) * p.n + i];
  }
  const T* logits = static_cast<const T*>(p.logits) + b * p.logits_batch_stride + node * p.logits_row_stride;
  Row<T, N> row = {logits, p.vocab, s.row, 0, mode == VerifyMode::greedy ? 1.0f : p.temperature[b]};
  int token = row.argmax();  // its barriers also cover parents and tokens
  if (mode != VerifyMode::greedy) {
    if (mode == VerifyMode::typical) judge_children(p, row, b, node, s, said.child_logp);
    int depth = 0;
    for (int at = node; at > 0; at = s.parents[at]) ++depth;
    const float u = philox_uniform(p.seed[b], p.offset[b] + depth + 1);
    token = row.draw(row.truncated(p.top_k[b], p.top_p[b]), u);
  }
  if (threadIdx.x == 0) said.token[node] = token;
  if (last_to_arrive(&arrived[b], p.n, &s.last)) choose_path(p, b, mode, s, said);
}

}  // namespace

WorkspaceSize verify_tree_workspace(const VerifyTreeParams& p) {
  return {static_cast<int64_t>(p.batch) * p.n * 8, p.batch};
}

int verify_tree(const VerifyTreeParams& p, Workspace workspace, uintptr_t stream) {
  const int64_t nodes = static_cast<int64_t>(p.batch) * p.n;
  auto* tokens = static_cast<int32_t*>(workspace.scratch);
  const Said said = {tokens, reinterpret_cast<float*>(tokens + nodes)};
  return with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    const bool aligned = multiple_of_16({p.logits}, {p.logits_batch_stride, p.logits_row_stride, p.vocab}, sizeof(T));
    return with_width<T>(aligned, [&](auto n) {
      return launch(verify_tree_kernel<T, n()>, static_cast<unsigned>(nodes), kRowThreads, sizeof(Shared), stream, p,
                    said, workspace.counters);
    });
  });
}

}  // namespace medusa::cuda
