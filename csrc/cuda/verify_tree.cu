// verify_tree in one launch. One block per (sequence, node) settles what that node says: its token (argmax or draw; a
// draw depends on the node's depth alone, so all nodes can draw at once) and, for typical acceptance, ln P of its
// children. The last of a sequence's blocks then picks the path.
#include "cuda/acceptance.cuh"
#include "cuda/common.cuh"
#include "cuda/ops.h"
#include "cuda/row_sampling.cuh"

namespace medusa::cuda {
namespace {

struct Shared {
  RowShared row;
  TreeShared<kRowThreads> tree;
  RowSums sums;
  int token;
};

int slices_of(const VerifyTreeParams& p) { return p.mode ? static_cast<int>(ceil_div(p.vocab, kSliceIds)) : 0; }

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads)
    verify_tree_kernel(VerifyTreeParams p, Slice* all_slices, int slice_count, Said all_said, uint32_t* arrived) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  Shared& s = shared_memory<Shared>();
  const int b = blockIdx.x / p.n, node = blockIdx.x % p.n, warp = threadIdx.x / 32;
  const VerifyMode mode = mode_of(p, b);
  const Said said = all_said.of(b, p.n);
  s.tree.load(p, b);
  const T* logits = static_cast<const T*>(p.logits) + b * p.logits_batch_stride + node * p.logits_row_stride;
  Row<T, N> row = {logits, p.vocab, s.row, 0, mode == VerifyMode::greedy ? 1.0f : p.temperature[b]};
  int token = row.argmax();  // its barriers also cover the tree
  if (mode != VerifyMode::greedy) {
    const bool whole = (p.top_k[b] <= 0 || p.top_k[b] >= p.vocab) && p.top_p[b] >= 1;
    const float u = philox_uniform(p.seed[b], p.offset[b] + s.tree.depth_of(node) + 1);
    if (whole || mode == VerifyMode::typical) {
      Slice* slices = all_slices + static_cast<int64_t>(blockIdx.x) * slice_count;
      for (int i = warp; i < slice_count; i += kRowWarps) {
        float logit[kLaneIds];
        row.slice(i, logit);
        const Slice slice = slice_of(logit, i * kSliceIds, true, row.temperature);
        if (threadIdx.x % 32 == 0) slices[i] = slice;
      }
      __syncthreads();
      if (warp == 0) {
        const RowSlices together = {slices, slice_count, row.temperature};
        s.sums = together.sums();
        if (whole) {
          const Crossing crossing = together.crossing(row.top, u);
          float logit[kLaneIds];
          row.slice(crossing.slice, logit);
          s.token = together.find(crossing, logit, row.top);
        }
      }
      __syncthreads();
      if (mode == VerifyMode::typical) {
        s.tree.judge_children(p, b, node, s.sums, said.child_logp,
                              [&](int child) { return to_float(logits[s.tree.tokens[child]]); });
      }
    }
    token = whole ? s.token : row.draw(row.truncated(p.top_k[b], p.top_p[b]), u);
  }
  if (threadIdx.x == 0) said.token[node] = token;
  if (last_to_arrive(&arrived[b], p.n, &s.tree.last)) s.tree.choose_path(p, b, mode, said);
}

}  // namespace

WorkspaceSize verify_tree_workspace(const VerifyTreeParams& p) {
  const int64_t nodes = static_cast<int64_t>(p.batch) * p.n;
  return {nodes * (slices_of(p) * static_cast<int64_t>(sizeof(Slice)) + Said::kBytes), p.batch};
}

int verify_tree(const VerifyTreeParams& p, Workspace workspace, uintptr_t stream) {
  const int64_t nodes = static_cast<int64_t>(p.batch) * p.n;
  auto* slices = static_cast<Slice*>(workspace.scratch);
  const Said said = Said::at(slices + nodes * slices_of(p), nodes);
  return with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    const bool aligned = multiple_of_16({p.logits}, {p.logits_batch_stride, p.logits_row_stride, p.vocab}, sizeof(T));
    return with_width<T>(aligned, [&](auto n) {
      return launch(verify_tree_kernel<T, n()>, static_cast<unsigned>(nodes), kRowThreads, sizeof(Shared), stream, p,
                    slices, slices_of(p), said, workspace.counters);
    });
  });
}

}  // namespace medusa::cuda
