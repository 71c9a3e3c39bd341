// draft_heads: a launch per residual block, all heads together, then one for the LM heads. A block of the latter takes
// a slice of the vocabulary, keeps each row's best candidates and its share of the normaliser, and drops the logits;
// the last block of a row tile merges the slices.
#include "cuda/few_rows.cuh"
#include "cuda/ops.h"

namespace medusa::cuda {
namespace {

constexpr int kSlice = 16 * kFewRowsWarps;  // vocabulary entries per block: 16 a warp, which sums over all of hidden

// What the blocks leave for the merging one. Rows count head by head: head * batch + b.
struct Slices {
  uint64_t* candidates;  // [rows, slices, kept], falling; see rank_key
  float2* stats;         // [rows, slices]: largest logit, sum of exp(logit - largest)
  int count, kept;
};

template <class Tile, class Next>
__global__ void __launch_bounds__(kFewRowsThreads, kFewRowsBlocksPerSm)
    residual_block_kernel(DraftHeadsParams p, int layer, Rows<typename Tile::X> x, Next* next) {
  using W = typename Tile::W;
  auto& s = shared_memory<typename Tile::Shared>();
  // Row tiles of the same features stand side by side, so that the second to read their weight finds it in L2.
  const int row = blockIdx.x * Tile::kRows, feature = blockIdx.y * Tile::kFeatures, head = blockIdx.z;
  const int64_t matrix = static_cast<int64_t>(head) * p.layers + layer;
  const int64_t size = p.hidden_size;
  const Weight<W> weight = {static_cast<const W*>(p.block_weight) + matrix * size * size, p.hidden_size, p.hidden_size};
  x.first += head * x.head_stride;
  x.count = p.batch;
  prefetch_weight<Tile>(weight, feature);
  wait_for_previous_kernel();
  let_next_kernel_start();
  Tile::multiply(weight, feature, x, row, s);
  for (int i = threadIdx.x; i < Tile::kFeatures * Tile::kRows; i += kFewRowsThreads) {
    const int f = feature + i % Tile::kFeatures, b = row + i / Tile::kFeatures;
    if (f >= p.hidden_size || b >= p.batch) continue;
    float y = Tile::result(s, i % Tile::kFeatures, i / Tile::kFeatures);
    if (p.block_bias) y += load_any(p.block_bias, p.bias_dtype, matrix * size + f);
    next[(static_cast<int64_t>(head) * p.batch + b) * size + f] = from_float<Next>(to_float(x.at(b)[f]) + silu(y));
  }
}

template <class Tile>
struct LmShared {
  typename Tile::Shared tile;
  alignas(16) uint64_t keys[kFewRowsWarps][kSlice];
  bool last;
};

// One warp: the k best of a row from all slices, best first.
__device__ void merge_slices(const DraftHeadsParams& p, const Slices& slices, int64_t row) {
  const int lane = threadIdx.x % 32;
  const float2* stats = slices.stats + row * slices.count;
  float top = -INFINITY, mass = 0;
  for (int i = lane; i < slices.count; i += 32) top = fmaxf(top, load_l2(stats + i).x);
  top = warp_max(top);
  for (int i = lane; i < slices.count; i += 32) {
    const float2 slice = load_l2(stats + i);
    mass += slice.y * expf(slice.x - top);
  }
  const float log_mass = logf(warp_sum(mass));

  // The best key below `last` in this lane's slices. Nearly always that is some slice's first candidate.
  const auto next_below = [&](uint64_t last) {
    uint64_t best = 0;
    for (int first = lane; first < slices.count; first += 32 * 32) {
      uint32_t spent = 0;  // slices whose first candidate is taken
#pragma unroll 8
      for (int i = 0; i < 32; ++i) {
        const int slice = first + i * 32;
        if (slice >= slices.count) break;
        const uint64_t key = load_l2(slices.candidates + (row * slices.count + slice) * slices.kept);
        if (key < last) {
          best = max(best, key);
        } else {
          spent |= 1u << i;
        }
      }
      for (; spent; spent &= spent - 1) {
        const int slice = first + (__ffs(spent) - 1) * 32;
        const uint64_t* candidates = slices.candidates + (row * slices.count + slice) * slices.kept;
        for (int i = 1; i < slices.kept; ++i) {
          const uint64_t key = load_l2(candidates + i);
          if (key < last) {
            best = max(best, key);
            break;
          }
        }
      }
    }
    return best;
  };
  uint64_t mine = next_below(~0ull);
  const int head = row / p.batch, b = row % p.batch;
  const int64_t out = (static_cast<int64_t>(b) * p.heads + head) * p.top_k;
  for (int i = 0; i < p.top_k; ++i) {
    uint64_t best = mine;
#pragma unroll
    for (int by = 16; by > 0; by /= 2) best = max(best, __shfl_xor_sync(kFullWarp, best, by));
    if (mine == best) {  // keys are unique: one lane
      const int token = rank_id(best);
      p.draft_tokens[out + i] = p.token_map ? p.token_map[token] : token;
      p.logprobs[out + i] = (rank_value(best) - top) - log_mass;
      mine = next_below(best);
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(kFewRowsThreads, kFewRowsBlocksPerSm)
    lm_head_kernel(DraftHeadsParams p, Rows<typename Tile::X> x, Slices slices, uint32_t* arrived) {
  static_assert(Tile::kFeatures == kSlice);
  using W = typename Tile::W;
  auto& s = shared_memory<LmShared<Tile>>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Row tiles of one slice stand side by side, so that the second to read it finds it in L2.
  const int first_row = blockIdx.x * Tile::kRows, slice = blockIdx.y, matrix = blockIdx.z;
  const int rows = p.own_lm_heads ? p.batch : p.heads * p.batch;  // of this matrix
  const int64_t matrix_row = static_cast<int64_t>(matrix) * p.batch;
  const Weight<W> weight = {
      static_cast<const W*>(p.lm_head_weight) + static_cast<int64_t>(matrix) * p.vocab * p.hidden_size, p.vocab,
      p.hidden_size};
  x.first += matrix * x.head_stride;
  x.count = rows;
  prefetch_weight<Tile>(weight, slice * kSlice);
  wait_for_previous_kernel();
  let_next_kernel_start();
  Tile::multiply(weight, slice * kSlice, x, first_row, s.tile);

  for (int r = warp; r < Tile::kRows && first_row + r < rows; r += kFewRowsWarps) {
    const int64_t row = matrix_row + first_row + r;
    float logit[kSlice / 32], top = -INFINITY, mass = 0;
    uint64_t key[kSlice / 32];
#pragma unroll
    for (int j = 0; j < kSlice / 32; ++j) {
      const int f = j * 32 + lane, token = slice * kSlice + f;
      logit[j] = token < p.vocab ? Tile::result(s.tile, f, r) : -INFINITY;
      key[j] = token < p.vocab ? rank_key(logit[j], token) : f;  // past the end: distinct, and below every real key
      s.keys[warp][f] = key[j];
      top = fmaxf(top, logit[j]);
    }
    top = warp_max(top);
#pragma unroll
    for (int j = 0; j < kSlice / 32; ++j) mass += logit[j] == -INFINITY ? 0.0f : expf(logit[j] - top);
    mass = warp_sum(mass);
    if (lane == 0) slices.stats[row * slices.count + slice] = {top, mass};
    __syncwarp();
    int rank[kSlice / 32] = {};
    for (int other = 0; other < kSlice; ++other) {
#pragma unroll
      for (int j = 0; j < kSlice / 32; ++j) rank[j] += s.keys[warp][other] > key[j];
    }
#pragma unroll
    for (int j = 0; j < kSlice / 32; ++j) {
      if (rank[j] < slices.kept) slices.candidates[(row * slices.count + slice) * slices.kept + rank[j]] = key[j];
    }
    __syncwarp();
  }

  if (!last_to_arrive(&arrived[matrix * gridDim.x + blockIdx.x], gridDim.y, &s.last)) return;
  for (int r = warp; r < Tile::kRows && first_row + r < rows; r += kFewRowsWarps) {
    merge_slices(p, slices, matrix_row + first_row + r);
  }
}

// ---- launcher ----

bool on_tensor_cores(const DraftHeadsParams& p) {
  const auto weights = static_cast<WeightFormat>(p.dtype);  // plain formats have the dtypes' numbers
  return p.dtype != DType::f32 && (p.block_format == weights || p.layers == 0) && p.lm_head_format == weights &&
         multiple_of_16({p.hidden, p.block_weight, p.lm_head_weight}, {p.hidden_row_stride, p.hidden_size}, 2);
}

int lm_rows(const DraftHeadsParams& p) { return p.own_lm_heads ? p.batch : p.heads * p.batch; }
int lm_matrices(const DraftHeadsParams& p) { return p.own_lm_heads ? p.heads : 1; }

// Where things lie in scratch, in bytes. Every part is a multiple of 16.
struct Layout {
  int64_t hidden;  // size of one of the two buffers that blocks pass on
  int64_t candidates, stats, total;
  int slices, kept;
};

Layout layout(const DraftHeadsParams& p) {
  Layout l = {};
  const int64_t rows = static_cast<int64_t>(p.heads) * p.batch;
  l.hidden = p.layers ? ceil_div(rows * p.hidden_size * (on_tensor_cores(p) ? 2 : 4), 16) * 16 : 0;
  l.slices = static_cast<int>(ceil_div(p.vocab, kSlice));
  l.kept = std::min(p.top_k, kSlice);
  l.candidates = (p.layers > 1 ? 2 : 1) * l.hidden;
  l.stats = l.candidates + ceil_div(rows * l.slices * l.kept * sizeof(uint64_t), 16) * 16;
  l.total = l.stats + rows * l.slices * sizeof(float2);
  return l;
}

template <class Tile, class Next>
int launch_block(const DraftHeadsParams& p, int layer, const Rows<typename Tile::X>& x, Next* next, uintptr_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.batch, Tile::kRows)),
                  static_cast<unsigned>(ceil_div(p.hidden_size, Tile::kFeatures)), p.heads);
  return launch(residual_block_kernel<Tile, Next>, grid, kFewRowsThreads, sizeof(typename Tile::Shared), stream, p,
                layer, x, next);
}

template <class Tile>
int launch_lm_head(const DraftHeadsParams& p, const Rows<typename Tile::X>& x, Workspace workspace, uintptr_t stream) {
  const Layout l = layout(p);
  char* scratch = static_cast<char*>(workspace.scratch);
  const Slices slices = {reinterpret_cast<uint64_t*>(scratch + l.candidates),
                         reinterpret_cast<float2*>(scratch + l.stats), l.slices, l.kept};
  const dim3 grid(static_cast<unsigned>(ceil_div(lm_rows(p), Tile::kRows)), l.slices, lm_matrices(p));
  return launch(lm_head_kernel<Tile>, grid, kFewRowsThreads, sizeof(LmShared<Tile>), stream, p, x, slices,
                workspace.counters);
}

// T: of hidden. Next: what the blocks pass on, T on tensor cores and fp32 otherwise. block(layer, x, next) and
// lm_head(x) launch; x is Rows<T> before the first block and Rows<Next> after it.
template <class T, class Next, class Block, class LmHead>
int launch_all(const DraftHeadsParams& p, Workspace workspace, Block block, LmHead lm_head) {
  const Rows<T> hidden = {static_cast<const T*>(p.hidden), 0, p.hidden_row_stride, p.batch, p.batch};
  if (p.layers == 0) return lm_head(hidden);
  Next* buffers[2];
  for (int i = 0; i < 2; ++i) {
    buffers[i] = reinterpret_cast<Next*>(static_cast<char*>(workspace.scratch) + i * layout(p).hidden);
  }
  const int64_t per_head = static_cast<int64_t>(p.batch) * p.hidden_size;
  Rows<Next> x = {buffers[0], per_head, p.hidden_size, p.batch, p.batch};
  int error = block(0, hidden, buffers[0]);
  for (int layer = 1; layer < p.layers && !error; ++layer) {
    Next* next = buffers[layer % 2];
    error = block(layer, x, next);
    x.first = next;
  }
  return error ? error : lm_head(x);
}

}  // namespace

WorkspaceSize draft_heads_workspace(const DraftHeadsParams& p) {
  return {layout(p).total, static_cast<int64_t>(lm_matrices(p)) * ceil_div(lm_rows(p), 8)};
}

int draft_heads(const DraftHeadsParams& p, Workspace workspace, uintptr_t stream) {
  if (on_tensor_cores(p)) {
    return with_half_type(p.dtype, [&](auto t) {
      using T = decltype(t);
      const auto block = [&](int layer, const Rows<T>& x, T* next) {
        return with_tensor_core_tile<T, kFewRowsWarps>(
            p.batch, [&](auto tile) { return launch_block<typename decltype(tile)::type>(p, layer, x, next, stream); });
      };
      return launch_all<T, T>(p, workspace, block, [&](const Rows<T>& x) {
        return with_tensor_core_tile<T, 1>(lm_rows(p), [&](auto tile) {
          return launch_lm_head<typename decltype(tile)::type>(p, x, workspace, stream);
        });
      });
    });
  }
  return with_type(p.dtype, [&](auto t) {
    const auto block = [&](int layer, const auto& x, float* next) {
      using X = std::decay_t<decltype(*x.first)>;
      return with_type(static_cast<DType>(p.block_format),
                       [&](auto w) { return launch_block<PlainTile<X, decltype(w), 32>>(p, layer, x, next, stream); });
    };
    return launch_all<decltype(t), float>(p, workspace, block, [&](const auto& x) {
      using X = std::decay_t<decltype(*x.first)>;
      return with_type(static_cast<DType>(p.lm_head_format), [&](auto w) {
        return launch_lm_head<PlainTile<X, decltype(w), kSlice>>(p, x, workspace, stream);
      });
    });
  });
}

}  // namespace medusa::cuda
