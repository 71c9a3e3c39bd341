// Rows times packed weights: the one inner product of the CPU backend. Each output is a sum over k in rising order,
// whatever rows stand beside it, so a row's result does not depend on its neighbours.
//
// A packed matrix is a sequence of tiles of 32 output columns (the last one filled up with zeros), each:
//   f32, f16   [k][32]
//   bf16       [k][16][2]: columns i and 16 + i side by side, which widen to two vectors by a shift and a mask
//   int8       float scales[32], then uint8 [k / 4][32][4], value + 128, k rounded up to a multiple of 64
#pragma once
#include "simd.h"

namespace medusa::cpu::MEDUSA_ISA {

constexpr int kTile = 32;   // columns
constexpr int kGroup = 64;  // k per scale of an int8 activation

// The left operand as the kernels read it. Floats, or for int8 weights bytes with a scale per row and group.
struct Rows {
  const float* x;          // [rows, k], row_stride apart
  const int8_t* q;         // [rows, k rounded up to kGroup]
  const float* scales;     // [rows, groups]
  const int32_t* offsets;  // [rows, groups]: -128 times the sum of the group's bytes
  int64_t row_stride;      // of x
  int rows, k;

  Rows part(int first, int count) const;
};

// Widens or quantises `x` into scratch (Scratch::rows) where the kernels cannot read it as it is.
Rows make_rows(const void* x, DType dtype, int64_t row_stride, int rows, int k, WeightFormat format);

int64_t tile_bytes(WeightFormat format, int k);
void pack_tile(const void* weight, DType dtype, int columns, int k, WeightFormat format, void* tile);

// out[r][0 .. 32) = the rows times one tile, `ld` floats from row to row.
void multiply_tile(const Rows& rows, WeightFormat format, const void* tile, float* out, int64_t ld);

// A matrix that may be plain: its tiles are then packed one by one into scratch (Scratch::tile), so that a plain and a
// packed weight give the same bits.
struct Matrix {
  const void* data;
  WeightFormat format;
  int columns, k;

  bool plain() const { return format < WeightFormat::packed_f32; }
  WeightFormat packed_format() const {
    return plain() ? static_cast<WeightFormat>(static_cast<int>(format) + 16) : format;
  }
  int tiles() const { return (columns + kTile - 1) / kTile; }
  // Bytes from one matrix to the next where several lie one behind the other.
  int64_t bytes() const;
  const void* tile(int index) const;
};

}  // namespace medusa::cpu::MEDUSA_ISA
