// verify_lm_head in two launches. The first multiplies: a block takes a slice of the vocabulary for a tile of rows,
// leaves each row's largest logit and sums, and drops the logits. The second decides: a block per (sequence, node)
// brings its row's slices together; a draw makes the logits of one slice anew. The last of a sequence's blocks picks
// the path. A logit is summed as in linear.cu and rounded to hidden's dtype, so that ties fall as they do there.
#include "cuda/acceptance.cuh"
#include "cuda/few_rows.cuh"
#include "cuda/ops.h"

namespace medusa::cuda {
namespace {

// What the first launch leaves for the second. rows: batch * n.
struct Partials {
  Slice* slices;       // [rows, count]
  float* child_logit;  // [rows]: typical's, of the node's token at its parent
  int count;
};

template <class Tile>
struct SliceShared {
  typename Tile::Shared tile;
  alignas(16) float logits[Tile::kRows][kSliceIds + 4];  // 16-byte accesses in any row
};

// The logits of one slice, for the rows of a tile.
template <class Tile>
__device__ void multiply_slice(const Weight<typename Tile::W>& weight, int slice, const Rows<typename Tile::X>& x,
                               int row, SliceShared<Tile>& s) {
  for (int f = 0; f < kSliceIds && slice * kSliceIds + f < weight.out_features; f += Tile::kFeatures) {
    Tile::multiply(weight, slice * kSliceIds + f, x, row, s.tile);
    for (int i = threadIdx.x; i < Tile::kFeatures * Tile::kRows; i += kFewRowsThreads) {
      const int feature = i % Tile::kFeatures, r = i / Tile::kFeatures;
      s.logits[r][f + feature] = to_float(from_float<typename Tile::X>(Tile::result(s.tile, feature, r)));
    }
    __syncthreads();
  }
}

// This lane's part of a row of the slice.
__device__ __forceinline__ void lane_logits(const float* logits, int slice, int vocab, float (&mine)[kLaneIds]) {
  const int first = threadIdx.x % 32 * kLaneIds;
  load<kLaneIds>(logits + first, mine);
#pragma unroll
  for (int j = 0; j < kLaneIds; ++j) {
    if (slice * kSliceIds + first + j >= vocab) mine[j] = -INFINITY;
  }
}

template <class Tile>
__global__ void __launch_bounds__(kFewRowsThreads, kFewRowsBlocksPerSm)
    project_kernel(VerifyLmHeadParams p, Weight<typename Tile::W> weight, Rows<typename Tile::X> x, Partials out) {
  auto& s = shared_memory<SliceShared<Tile>>();
  const VerifyTreeParams& tree = p.tree;
  // Row tiles of one slice stand side by side, so that the second to read it finds it in L2.
  const int first_row = blockIdx.x * Tile::kRows, slice = blockIdx.y, lane = threadIdx.x % 32;
  const int rows = min(Tile::kRows, x.count - first_row);
  prefetch_weight<Tile>(weight, slice * kSliceIds);
  wait_for_previous_kernel();
  let_next_kernel_start();
  multiply_slice<Tile>(weight, slice, x, first_row, s);
  for (int r = threadIdx.x / 32; r < rows; r += kFewRowsWarps) {
    const int b = (first_row + r) / tree.n;
    const bool sums = mode_of(tree, b) != VerifyMode::greedy;
    float logit[kLaneIds];
    lane_logits(s.logits[r], slice, tree.vocab, logit);
    const Slice made = slice_of(logit, slice * kSliceIds, sums, sums ? tree.temperature[b] : 1.0f);
    if (lane == 0) out.slices[static_cast<int64_t>(first_row + r) * out.count + slice] = made;
  }
  if (!tree.mode) return;
  const int first_b = first_row / tree.n, last_b = (first_row + rows - 1) / tree.n;
  for (int i = first_b * tree.n + threadIdx.x; i < (last_b + 1) * tree.n; i += kFewRowsThreads) {
    const int b = i / tree.n, node = i % tree.n;
    if (node == 0 || mode_of(tree, b) != VerifyMode::typical) continue;
    const int r = b * tree.n + tree.parents[b * tree.parents_batch_stride + node] - first_row;
    const int id = tree.tree_tokens[i] - slice * kSliceIds;
    if (r >= 0 && r < rows && id >= 0 && id < kSliceIds) out.child_logit[i] = s.logits[r][id];
  }
}

template <class Tile>
struct DecideShared {
  TreeShared<kFewRowsThreads> tree;
  SliceShared<Tile> slice;
  RowSums sums;
  Crossing crossing;
  int token;
};

template <class Tile>
__global__ void __launch_bounds__(kFewRowsThreads, kFewRowsBlocksPerSm)
    decide_kernel(VerifyLmHeadParams p, Weight<typename Tile::W> weight, Rows<typename Tile::X> x, Partials partials,
                  Said all_said, uint32_t* arrived) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  auto& s = shared_memory<DecideShared<Tile>>();
  const VerifyTreeParams& tree = p.tree;
  const int row = blockIdx.x, b = row / tree.n, node = row % tree.n, warp = threadIdx.x / 32;
  const VerifyMode mode = mode_of(tree, b);
  const Said said = all_said.of(b, tree.n);
  const RowSlices slices = {partials.slices + static_cast<int64_t>(row) * partials.count, partials.count,
                            mode == VerifyMode::greedy ? 1.0f : tree.temperature[b]};
  s.tree.load(tree, b);
  __syncthreads();
  if (warp == 0) {
    s.sums = mode == VerifyMode::greedy ? RowSums{slices.best(), 0, 0} : slices.sums();
    if (mode != VerifyMode::greedy) {
      const float u = philox_uniform(tree.seed[b], tree.offset[b] + s.tree.depth_of(node) + 1);
      s.crossing = slices.crossing(s.sums.top(), u);
    }
  }
  __syncthreads();
  int token = rank_id(s.sums.best);
  if (mode == VerifyMode::typical) {
    s.tree.judge_children(tree, b, node, s.sums, said.child_logp,
                          [&](int child) { return partials.child_logit[static_cast<int64_t>(b) * tree.n + child]; });
  }
  if (mode != VerifyMode::greedy) {
    x.count = row + 1;  // of the tile's rows this one alone
    multiply_slice<Tile>(weight, s.crossing.slice, x, row, s.slice);
    if (warp == 0) {
      float logit[kLaneIds];
      lane_logits(s.slice.logits[0], s.crossing.slice, tree.vocab, logit);
      s.token = slices.find(s.crossing, logit, s.sums.top());
    }
    __syncthreads();
    token = s.token;
  }
  if (threadIdx.x == 0) said.token[node] = token;
  if (last_to_arrive(&arrived[b], tree.n, &s.tree.last)) s.tree.choose_path(tree, b, mode, said);
}

// ---- launcher ----

int row_count(const VerifyLmHeadParams& p) { return p.tree.batch * p.tree.n; }
int slice_count(const VerifyLmHeadParams& p) { return static_cast<int>(ceil_div(p.tree.vocab, kSliceIds)); }

// Project: for many rows. Decide: for one.
template <class Project, class Decide>
int launch_tiles(const VerifyLmHeadParams& p, Workspace workspace, uintptr_t stream) {
  using X = typename Project::X;
  using W = typename Project::W;
  const int rows = row_count(p), count = slice_count(p);
  auto* slices = static_cast<Slice*>(workspace.scratch);
  const Said said = Said::at(slices + static_cast<int64_t>(rows) * count, rows);
  const Partials partials = {slices, said.child_logp + rows, count};
  const Weight<W> weight = {static_cast<const W*>(p.lm_head_weight), p.tree.vocab, p.hidden_size};
  const Rows<X> x = {static_cast<const X*>(p.hidden), 0, p.hidden_size, rows, rows};
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, Project::kRows)), count);
  const int error = launch(project_kernel<Project>, grid, kFewRowsThreads, sizeof(SliceShared<Project>), stream, p,
                           weight, x, partials);
  return error ? error
               : launch(decide_kernel<Decide>, rows, kFewRowsThreads, sizeof(DecideShared<Decide>), stream, p, weight,
                        x, partials, said, workspace.counters);
}

}  // namespace

WorkspaceSize verify_lm_head_workspace(const VerifyLmHeadParams& p) {
  const int64_t node = slice_count(p) * static_cast<int64_t>(sizeof(Slice)) + Said::kBytes + sizeof(float);
  return {row_count(p) * node, p.tree.batch};
}

int verify_lm_head(const VerifyLmHeadParams& p, Workspace workspace, uintptr_t stream) {
  const DType weight_dtype = static_cast<DType>(p.lm_head_format);  // plain formats have the dtypes' numbers
  const DType dtype = p.tree.dtype;
  const bool on_tensor_cores =
      dtype != DType::f32 && dtype == weight_dtype && multiple_of_16({p.hidden, p.lm_head_weight}, {p.hidden_size}, 2);
  if (on_tensor_cores) {
    return with_half_type(dtype, [&](auto t) {
      using T = decltype(t);
      return with_tensor_core_tile<T, kFewRowsWarps>(row_count(p), [&](auto tile) {
        return launch_tiles<typename decltype(tile)::type, TensorCoreTile<T, 1, kFewRowsWarps>>(p, workspace, stream);
      });
    });
  }
  return with_type(dtype, [&](auto x) {
    return with_type(weight_dtype, [&](auto w) {
      using Tile = PlainTile<decltype(x), decltype(w), kSliceIds>;
      return launch_tiles<Tile, Tile>(p, workspace, stream);
    });
  });
}

}  // namespace medusa::cuda
