// compact_kv: one launch for all layers. A thread owns one column (16 bytes) of one sequence's rows and moves it down
// the path, so no two threads touch the same bytes and no barrier is needed.
#include "cuda/ops.h"
#include "cuda/ptx.cuh"

namespace medusa::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kInFlight = 4;  // rows read before the first is written: hides latency, since paths are short

// Chunk: the access width, uint4 where everything is 16-byte aligned, else two bytes.
template <class Chunk>
__global__ void __launch_bounds__(kThreads) compact_kv_kernel(CompactKvParams p, int blocks_per_row) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int column = blockIdx.x % blocks_per_row * kThreads + threadIdx.x;
  if (column >= p.row_bytes / static_cast<int>(sizeof(Chunk))) return;
  const int b = blockIdx.x / blocks_per_row % p.batch;
  const int layer_kv = blockIdx.x / blocks_per_row / p.batch;

  const int64_t first_row = layer_kv / 2 * p.layer_stride + layer_kv % 2 * p.kv_stride + b * p.batch_stride +
                            p.cache_seqlens[b] * p.row_stride;
  const auto row = [&](int node) {  // the column's bytes in the row of tree node `node`
    const int64_t element = first_row + node * p.row_stride;
    return reinterpret_cast<Chunk*>(static_cast<char*>(p.kv_cache) + element * p.element_size) + column;
  };
  const int32_t* nodes = p.accepted_nodes + static_cast<int64_t>(b) * p.width;
  const int count = p.accept_length[b] + 1;

  // Path nodes rise, so nodes[i] >= i: a row written here lies below every row still to be read.
  for (int i = 0; i < count; i += kInFlight) {
    Chunk held[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (i + j < count) held[j] = *row(nodes[i + j]);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (i + j < count && nodes[i + j] != i + j) *row(i + j) = held[j];
    }
  }
}

bool aligned16(const CompactKvParams& p) {
  const int64_t strides = p.layer_stride | p.kv_stride | p.batch_stride | p.row_stride;
  return (reinterpret_cast<uintptr_t>(p.kv_cache) | strides * p.element_size | p.row_bytes) % 16 == 0;
}

template <class Chunk>
int launch_chunks(const CompactKvParams& p, uintptr_t stream) {
  const int chunks = p.row_bytes / static_cast<int>(sizeof(Chunk));
  const int blocks_per_row = (chunks + kThreads - 1) / kThreads;
  const unsigned grid = static_cast<unsigned>(p.layers) * 2 * p.batch * blocks_per_row;
  return grid ? launch(compact_kv_kernel<Chunk>, grid, kThreads, 0, stream, p, blocks_per_row) : 0;
}

}  // namespace

int compact_kv(const CompactKvParams& p, uintptr_t stream) {
  return aligned16(p) ? launch_chunks<uint4>(p, stream) : launch_chunks<uint16_t>(p, stream);
}

}  // namespace medusa::cuda
