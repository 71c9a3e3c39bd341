// x @ weight^T + bias + residual.
#include "isa.h"
#include "matmul.h"
#include "threads.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

// Adds bias and residual to a tile's sums and writes them in the output's dtype.
void finish_tile(const LinearParams& p, const float* sums, int first, int count) {
  for (int r = 0; r < p.rows; ++r, sums += kTile) {
    for_vectors(count, [&](int i, int lanes) {
      Vec value = load(sums + i);
      if (p.bias) value = value + load_part(p.bias, p.bias_dtype, first + i, lanes);
      if (p.residual) value = value + load_part(p.residual, p.dtype, r * p.residual_row_stride + first + i, lanes);
      store_part(p.out, p.dtype, r * p.out_row_stride + first + i, value, lanes);
    });
  }
}

}  // namespace

void linear(const LinearParams& p) {
  const Matrix weight = {p.weight, p.weight_format, p.out_features, p.in_features};
  const Rows rows = make_rows(p.x, p.dtype, p.x_row_stride, p.rows, p.in_features, weight.packed_format());
  const double nanoseconds = 0.06 * weight.bytes() + 0.01 * p.rows * p.in_features * p.out_features;
  parallel_for(weight.tiles(), nanoseconds, [&](int tile) {
    float* sums = scratch_of<float>(Scratch::piece, static_cast<size_t>(p.rows) * kTile);
    multiply_tile(rows, weight.packed_format(), weight.tile(tile), sums, kTile);
    finish_tile(p, sums, tile * kTile, smaller(kTile, p.out_features - tile * kTile));
  });
}

int64_t packed_bytes(int matrices, int out_features, int in_features, WeightFormat format) {
  return matrices * Matrix{nullptr, format, out_features, in_features}.bytes();
}

void pack(const void* weight, void* packed, int matrices, int out_features, int in_features, DType dtype,
          WeightFormat format) {
  const Matrix target = {packed, format, out_features, in_features};
  const int tiles = target.tiles();
  const int64_t size = tile_bytes(format, in_features);
  parallel_for(matrices * tiles, 1.0 * matrices * out_features * in_features, [&](int piece) {
    const int matrix = piece / tiles, first = piece % tiles * kTile;
    const int64_t row = static_cast<int64_t>(matrix) * out_features + first;
    pack_tile(element(weight, dtype, row * in_features), dtype, smaller(kTile, out_features - first), in_features,
              format, static_cast<char*>(packed) + piece * size);
  });
}

}  // namespace medusa::cpu::MEDUSA_ISA
