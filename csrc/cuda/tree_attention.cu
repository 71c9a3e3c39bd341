// tree_attention on tensor cores: bf16 and fp16, head_dim a multiple of 8, 16-byte aligned rows. Anything else goes row
// by row (tree_attention_by_rank.cuh).
//
// The n * group query rows that share a K/V head are packed into tiles of 64 rows. A block takes one such tile over one
// stretch of keys (a split); splits are as many as fill the chip whatever the lengths, which only the device knows.
// Each block leaves its sums in scratch, and the last of a tile's blocks to arrive combines them.
#include "cuda/common.cuh"
#include "cuda/ops.h"
#include "cuda/tree_attention_by_rank.cuh"

namespace medusa::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kRows = 16 * kWarps;  // query rows per block: one tensor-core tile a warp
constexpr int kMaxSplits = 64;
constexpr int kBlocksPerSm = 2;
constexpr float kLog2e = 1.4426950408889634f;

// What the rows of the splits count for in the combination.
struct Weights {
  float2 of[kMaxSplits][kRows];  // the split's weight, its sum
  float total[kRows];
};

// Dim: head_dim padded to 64, 128 or 256.
template <class T, int Dim>
struct Shape {
  static constexpr int kKeys = Dim <= 128 ? 64 : 32;  // per tile
  static constexpr int kStages = Dim <= 128 ? 3 : 2;  // so that 99 KB hold them: all that sm_86, sm_89 and sm_120 have
  static constexpr bool kQueriesInRegisters = Dim <= 128;
  static constexpr int kChunks = Dim / 8;  // 16-byte chunks per row

  struct Tiles {
    T k[kStages][kKeys * Dim];
    T v[kStages][kKeys * Dim];
  };
  struct Shared {
    union {
      Tiles tiles;
      Weights weights;  // once the last block of a tile has done with its own keys
    };
    T q[kQueriesInRegisters ? 8 : kRows * Dim];
    bool last;
  };
};

// What the combining block reads: of each split, the running maximum, the sum and the weighted values of every row.
struct Partials {
  float* values;  // [tiles, splits, kRows, Dim]
  float2* stats;  // [tiles, splits, kRows]: maximum (log2 domain), sum
};

__host__ __device__ inline int64_t partial_rows(int64_t tiles, int splits) { return tiles * splits * kRows; }

// Where chunk `chunk` of row `row` lies in a shared tile: rows are permuted so that the eight rows one ldmatrix tile
// reads, and the chunks one cp.async row writes, fall into different banks.
template <int Dim>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * Dim + (chunk ^ (row & 7)) * 8;
}

// Bit c tells whether key first + c is visible to a node, where `first` counts from the tree's own first key.
__device__ __forceinline__ uint64_t visible_keys(const uint64_t* mask_row, int words, int first) {
  uint64_t bits = first >= 0 ? 0 : first <= -64 ? ~0ull : (1ull << -first) - 1;  // the prefix is visible to all
  const int word = (first - (first < 0 ? 63 : 0)) / 64;
#pragma unroll
  for (int w = word; w < word + 2; ++w) {
    const int position = w * 64 - first;
    if (w < 0 || w >= words || position >= 64) continue;
    bits |= position >= 0 ? mask_row[w] << position : mask_row[w] >> -position;
  }
  return bits;
}

// Adds up the splits of a tile, in their order, and writes its rows: one block, so it is written to wait for memory
// seldom. `first`: the partial row of split 0, row 0; out_row(row): where a row goes.
template <class T, int Dim, class OutRow>
__device__ __forceinline__ void combine(const Partials& partials, int64_t first, int splits, int rows, int head_dim,
                                        OutRow out_row, Weights& weights) {
#pragma unroll 4
  for (int i = threadIdx.x; i < splits * kRows; i += kThreads) {
    if (i % kRows < rows) weights.of[i / kRows][i % kRows] = load_l2(&partials.stats[first + i]);
  }
  __syncthreads();
  if (threadIdx.x < rows) {
    float highest = -INFINITY, total = 0;
    for (int split = 0; split < splits; ++split) highest = fmaxf(highest, weights.of[split][threadIdx.x].x);
    for (int split = 0; split < splits; ++split) {
      float2& of = weights.of[split][threadIdx.x];
      of.x = exp2f(of.x - highest);
      total += of.x * of.y;
    }
    weights.total[threadIdx.x] = total;
  }
  __syncthreads();

  // Groups of four columns a thread, and splits whose loads are under way: no more registers than the products need.
  constexpr int kQuads = Dim <= 64 ? 2 : 4, kInFlight = 8;
  const int quads = head_dim / 4, count = rows * quads;
  for (int i = threadIdx.x; i < count; i += kThreads * kQuads) {
    int row[kQuads], column[kQuads];
    const float* from[kQuads];
    float4 mixed[kQuads] = {};
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int at = min(i + q * kThreads, count - 1);
      row[q] = at / quads;
      column[q] = at % quads * 4;
      from[q] = partials.values + (first + row[q]) * Dim + column[q];
    }
    for (int split = 0; split < splits; split += kInFlight) {
      float4 values[kInFlight][kQuads];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (split + j >= splits) break;
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          values[j][q] = load_l2(reinterpret_cast<const float4*>(from[q] + (split + j) * kRows * Dim));
        }
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (split + j >= splits) break;
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          const float weight = weights.of[split + j][row[q]].x;
          mixed[q].x += weight * values[j][q].x;
          mixed[q].y += weight * values[j][q].y;
          mixed[q].z += weight * values[j][q].z;
          mixed[q].w += weight * values[j][q].w;
        }
      }
    }
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      if (i + q * kThreads >= count) break;
      const float total = weights.total[row[q]];
      const float normalised[4] = {mixed[q].x / total, mixed[q].y / total, mixed[q].z / total, mixed[q].w / total};
      store<4>(out_row(row[q]) + column[q], normalised);
    }
  }
}

template <class T, int Dim>
__global__ void __launch_bounds__(kThreads, Dim <= 128 ? kBlocksPerSm : 1)
    tree_attention_kernel(TreeAttentionParams p, Partials partials, uint32_t* arrived, int row_tiles, int splits) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  using S = Shape<T, Dim>;
  constexpr int kKeys = S::kKeys, kStages = S::kStages, kChunks = S::kChunks;
  typename S::Shared& s = shared_memory<typename S::Shared>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // Row tiles of one stretch of keys stand side by side, so that the second to read it finds it in L2.
  const int row_tile = blockIdx.x % row_tiles;
  const int split = blockIdx.x / row_tiles % splits;
  const int kv_head = blockIdx.x / row_tiles / splits % p.kv_heads;
  const int b = blockIdx.x / row_tiles / splits / p.kv_heads;
  const int64_t tile = (static_cast<int64_t>(b) * p.kv_heads + kv_head) * row_tiles + row_tile;

  const int prefix = p.cache_seqlens[b], keys = prefix + p.n;
  const int key_tiles = (keys + kKeys - 1) / kKeys;
  const int tiles_per_split = (key_tiles + splits - 1) / splits;
  const int used_splits = (key_tiles + tiles_per_split - 1) / tiles_per_split;
  if (split >= used_splits) return;
  const int first_tile = split * tiles_per_split;
  const int tile_count = min(tiles_per_split, key_tiles - first_tile);

  const int group = p.heads / p.kv_heads;
  const int rows = min(kRows, p.n * group - row_tile * kRows);
  const auto node_of = [&](int row) { return (row_tile * kRows + row) / group; };
  const auto head_of = [&](int row) { return kv_head * group + (row_tile * kRows + row) % group; };

  // The one place that knows where a key's or value's row lies.
  const auto kv_row = [&](const void* cache, int key) {
    return static_cast<const T*>(cache) + b * p.kv_batch_stride + key * p.kv_row_stride + kv_head * p.kv_head_stride;
  };
  const auto load_keys = [&](int index) {  // the split's tile `index` into its stage; always one group
    if (index < tile_count) {
      const int stage = index % kStages, first_key = (first_tile + index) * kKeys;
#pragma unroll
      for (int i = 0; i < kKeys * kChunks / kThreads; ++i) {
        const int row = (i * kThreads + threadIdx.x) / kChunks, chunk = threadIdx.x % kChunks;
        const bool valid = first_key + row < keys && chunk * 8 < p.head_dim;
        const int at = swizzled<Dim>(row, chunk);
        const int key = valid ? first_key + row : 0;
        cp_async16(&s.tiles.k[stage][at], kv_row(p.k_cache, key) + (valid ? chunk * 8 : 0), valid);
        cp_async16(&s.tiles.v[stage][at], kv_row(p.v_cache, key) + (valid ? chunk * 8 : 0), valid);
      }
    }
    cp_async_commit();
  };

  // Queries pass through the stage that is filled last.
  T* q_shared = S::kQueriesInRegisters ? s.tiles.k[kStages - 1] : s.q;
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int row = (i * kThreads + threadIdx.x) / kChunks, chunk = threadIdx.x % kChunks;
    const bool valid = row < rows && chunk * 8 < p.head_dim;
    const int64_t from = valid ? node_of(row) * p.q_row_stride + head_of(row) * p.q_head_stride + chunk * 8 : 0;
    cp_async16(&q_shared[swizzled<Dim>(row, chunk)], static_cast<const T*>(p.q) + b * p.q_batch_stride + from, valid);
  }
  cp_async_commit();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load_keys(i);

  const auto query_fragment = [&](uint32_t (&a)[4], int step) {
    ldmatrix_x4(a, &q_shared[swizzled<Dim>(warp * 16 + lane % 16, step * 2 + lane / 16)]);
  };
  uint32_t q[S::kQueriesInRegisters ? Dim / 16 : 1][4];
  if constexpr (S::kQueriesInRegisters) {
    cp_async_wait<kStages - 1>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < Dim / 16; ++step) query_fragment(q[step], step);
  }

  // A lane holds two rows of its warp's tile: lane / 4 and that + 8.
  const int my_row = warp * 16 + lane / 4;
  const uint64_t* mask_rows[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int node = node_of(min(my_row + 8 * half, rows - 1));
    mask_rows[half] = p.tree_mask + b * p.mask_batch_stride + static_cast<int64_t>(node) * p.words;
  }
  const float scale = p.scale * kLog2e;
  float out[Dim / 8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  for (int index = 0; index < tile_count; ++index) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this tile is there for all, and all are done with the one before
    load_keys(index + kStages - 1);
    if (warp * 16 >= rows) continue;  // few rows: the other warps only help to load

    const T* k = s.tiles.k[index % kStages];
    const T* v = s.tiles.v[index % kStages];
    float score[kKeys / 8][4] = {};
#pragma unroll
    for (int step = 0; step < Dim / 16; ++step) {
      uint32_t loaded[4];
      if constexpr (!S::kQueriesInRegisters) query_fragment(loaded, step);
      const uint32_t (&a)[4] = S::kQueriesInRegisters ? q[S::kQueriesInRegisters ? step : 0] : loaded;
#pragma unroll
      for (int pair = 0; pair < kKeys / 16; ++pair) {
        uint32_t fragment[4];
        ldmatrix_x4(fragment, &k[swizzled<Dim>(pair * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2)]);
        mma_16816<T>(score[2 * pair], a, fragment[0], fragment[1]);
        mma_16816<T>(score[2 * pair + 1], a, fragment[2], fragment[3]);
      }
    }

    // Before the mask: a scale that is not positive would turn -inf into NaN or +inf.
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) score[i][j] *= scale;
    }
    const int first_in_tree = (first_tile + index) * kKeys - prefix;
    if (first_in_tree + kKeys > 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint64_t visible = visible_keys(mask_rows[half], p.words, first_in_tree);
#pragma unroll
        for (int i = 0; i < kKeys / 8; ++i) {
          const uint64_t two = visible >> (i * 8 + lane % 4 * 2);
          if (!(two & 1)) score[i][2 * half] = -INFINITY;
          if (!(two & 2)) score[i][2 * half + 1] = -INFINITY;
        }
      }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = maximum[half];
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) highest = fmaxf(highest, fmaxf(score[i][2 * half], score[i][2 * half + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, 2));
      const float base = highest == -INFINITY ? 0.0f : highest;  // a row may see no key of this tile
      const float correction = exp2f(maximum[half] - base);
      maximum[half] = highest;
      sum[half] *= correction;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        score[i][2 * half] = exp2f(score[i][2 * half] - base);
        score[i][2 * half + 1] = exp2f(score[i][2 * half + 1] - base);
        sum[half] += score[i][2 * half] + score[i][2 * half + 1];
      }
#pragma unroll
      for (int i = 0; i < Dim / 8; ++i) {
        out[i][2 * half] *= correction;
        out[i][2 * half + 1] *= correction;
      }
    }

    // The accumulators' layout is that of the next product's left operand, once rounded.
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      const uint32_t a[4] = {pack2<T>(score[2 * step][0], score[2 * step][1]),
                             pack2<T>(score[2 * step][2], score[2 * step][3]),
                             pack2<T>(score[2 * step + 1][0], score[2 * step + 1][1]),
                             pack2<T>(score[2 * step + 1][2], score[2 * step + 1][3])};
#pragma unroll
      for (int pair = 0; pair < Dim / 16; ++pair) {
        uint32_t fragment[4];
        ldmatrix_x4_trans(fragment, &v[swizzled<Dim>(step * 16 + lane % 16, pair * 2 + lane / 16)]);
        mma_16816<T>(out[2 * pair], a, fragment[0], fragment[1]);
        mma_16816<T>(out[2 * pair + 1], a, fragment[2], fragment[3]);
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(kFullWarp, sum[half], 1);
    sum[half] += __shfl_xor_sync(kFullWarp, sum[half], 2);
  }

  const auto out_row = [&](int row) {
    const int64_t node_row = static_cast<int64_t>(b) * p.n + node_of(row);
    return static_cast<T*>(p.out) + (node_row * p.heads + head_of(row)) * p.head_dim;
  };
  const int column = lane % 4 * 2;
  if (used_splits == 1) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = my_row + 8 * half;
      if (row >= rows) continue;
      const float inverse = 1.0f / sum[half];
#pragma unroll
      for (int i = 0; i < Dim / 8; ++i) {
        if (i * 8 < p.head_dim) {
          *reinterpret_cast<uint32_t*>(out_row(row) + i * 8 + column) =
              pack2<T>(out[i][2 * half] * inverse, out[i][2 * half + 1] * inverse);
        }
      }
    }
    return;
  }

  const auto partial_row = [&](int of_split, int row) { return (tile * splits + of_split) * kRows + row; };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = my_row + 8 * half;
    if (row >= rows) continue;
    const int64_t at = partial_row(split, row);
    if (column == 0) partials.stats[at] = {maximum[half], sum[half]};
#pragma unroll
    for (int i = 0; i < Dim / 8; ++i) {
      if (i * 8 < p.head_dim) {
        *reinterpret_cast<float2*>(partials.values + at * Dim + i * 8 + column) = {out[i][2 * half],
                                                                                   out[i][2 * half + 1]};
      }
    }
  }
  if (!last_to_arrive(&arrived[tile], used_splits, &s.last)) return;

  combine<T, Dim>(partials, partial_row(0, 0), used_splits, rows, p.head_dim, out_row, s.weights);
}

// ---- launcher ----

struct Plan {
  int row_tiles, splits;
  int64_t tiles;
};

Plan plan(const TreeAttentionParams& p) {
  const int row_tiles = static_cast<int>(ceil_div(p.n * (p.heads / p.kv_heads), kRows));
  const int64_t tiles = static_cast<int64_t>(p.batch) * p.kv_heads * row_tiles;
  const int64_t filling = int64_t{sm_count()} * kBlocksPerSm / tiles;
  const int64_t useful = ceil_div(p.max_seqlen, 64);
  return {row_tiles, static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({filling, useful, kMaxSplits}))), tiles};
}

int padded_dim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

bool on_tensor_cores(const TreeAttentionParams& p) {
  return !p.row_invariant && p.q_dtype != DType::f32 && p.q_dtype == p.kv_dtype && p.head_dim % 8 == 0 &&
         multiple_of_16(
             {p.q, p.k_cache, p.v_cache, p.out},
             {p.q_batch_stride, p.q_row_stride, p.q_head_stride, p.kv_batch_stride, p.kv_row_stride, p.kv_head_stride},
             2);
}

template <class T, int Dim>
int launch_tiles(const TreeAttentionParams& p, Workspace workspace, uintptr_t stream) {
  const Plan how = plan(p);
  float* values = static_cast<float*>(workspace.scratch);
  const Partials partials = {values, reinterpret_cast<float2*>(values + partial_rows(how.tiles, how.splits) * Dim)};
  return launch(tree_attention_kernel<T, Dim>, static_cast<unsigned>(how.tiles * how.splits), kThreads,
                sizeof(typename Shape<T, Dim>::Shared), stream, p, partials, workspace.counters, how.row_tiles,
                how.splits);
}

}  // namespace

WorkspaceSize tree_attention_workspace(const TreeAttentionParams& p) {
  const Plan how = plan(p);
  if (!on_tensor_cores(p) || how.splits == 1) return {0, 0};
  const int64_t bytes_per_row = padded_dim(p.head_dim) * sizeof(float) + sizeof(float2);
  return {partial_rows(how.tiles, how.splits) * bytes_per_row, how.tiles};
}

int tree_attention(const TreeAttentionParams& p, Workspace workspace, uintptr_t stream) {
  if (!on_tensor_cores(p)) return tree_attention_by_rank(p, stream);
  return with_half_type(p.q_dtype, [&](auto t) {
    using T = decltype(t);
    switch (padded_dim(p.head_dim)) {
      case 64:
        return launch_tiles<T, 64>(p, workspace, stream);
      case 128:
        return launch_tiles<T, 128>(p, workspace, stream);
      default:
        return launch_tiles<T, 256>(p, workspace, stream);
    }
  });
}

}  // namespace medusa::cuda
