// linear for few rows: a block takes 16 features; its eight warps share their sums, so that even a small matrix fills
// the chip.
#include "cuda/few_rows.cuh"
#include "cuda/ops.h"

namespace medusa::cuda {
namespace {

template <class Tile, class Out>
__global__ void __launch_bounds__(kFewRowsThreads, kFewRowsBlocksPerSm)
    linear_kernel(LinearParams p, Weight<typename Tile::W> weight, Rows<typename Tile::X> x, int row_tiles) {
  auto& s = shared_memory<typename Tile::Shared>();
  // Row tiles of the same features stand side by side, so that the second to read their weight finds it in L2.
  const int feature = blockIdx.x / row_tiles * Tile::kFeatures, row = blockIdx.x % row_tiles * Tile::kRows;
  prefetch_weight<Tile>(weight, feature);
  wait_for_previous_kernel();
  let_next_kernel_start();
  Tile::multiply(weight, feature, x, row, s);
  for (int i = threadIdx.x; i < Tile::kFeatures * Tile::kRows; i += kFewRowsThreads) {
    const int f = feature + i % Tile::kFeatures, r = row + i / Tile::kFeatures;
    if (f >= p.out_features || r >= p.rows) continue;
    float value = Tile::result(s, i % Tile::kFeatures, i / Tile::kFeatures);
    if (p.bias) value += load_any(p.bias, p.bias_dtype, f);
    if (p.residual) value += to_float(static_cast<const Out*>(p.residual)[r * p.residual_row_stride + f]);
    static_cast<Out*>(p.out)[r * p.out_row_stride + f] = from_float<Out>(value);
  }
}

template <class Tile>
int launch_tile(const LinearParams& p, uintptr_t stream) {
  using X = typename Tile::X;
  using W = typename Tile::W;
  const Weight<W> weight = {static_cast<const W*>(p.weight), p.out_features, p.in_features};
  const Rows<X> x = {static_cast<const X*>(p.x), 0, p.x_row_stride, p.rows, p.rows};
  const int row_tiles = static_cast<int>(ceil_div(p.rows, Tile::kRows));
  const int64_t blocks = ceil_div(p.out_features, Tile::kFeatures) * row_tiles;
  return launch(linear_kernel<Tile, X>, static_cast<unsigned>(blocks), kFewRowsThreads, sizeof(typename Tile::Shared),
                stream, p, weight, x, row_tiles);
}

}  // namespace

int linear(const LinearParams& p, uintptr_t stream) {
  const DType weight_dtype = static_cast<DType>(p.weight_format);  // plain formats have the dtypes' numbers
  const bool on_tensor_cores = p.dtype != DType::f32 && p.dtype == weight_dtype &&
                               multiple_of_16({p.x, p.weight}, {p.x_row_stride, p.in_features}, 2);
  if (on_tensor_cores) {
    return with_half_type(p.dtype, [&](auto t) {
      return with_tensor_core_tile<decltype(t), kFewRowsWarps>(
          p.rows, [&](auto tile) { return launch_tile<typename decltype(tile)::type>(p, stream); });
    });
  }
  return with_type(p.dtype, [&](auto x) {
    return with_type(weight_dtype,
                     [&](auto w) { return launch_tile<PlainTile<decltype(x), decltype(w), 32>>(p, stream); });
  });
}

}  // namespace medusa::cuda
