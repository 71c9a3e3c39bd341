// Both operands of multiply_tile as its kernels read them: rows widened or quantised, weights in tiles.
#include <math.h>

#include "matmul.h"
#include "threads.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

constexpr float kLeast = 1e-36f;  // 127 over a magnitude below it may be infinity

// Symmetric: the largest magnitude of a group becomes 127. A group that holds NaN or infinity has a scale of NaN, and
// one so small that the inverse would be infinity counts as zeros.
void quantise_row(const float* x, int k, int8_t* q, float* scales, int32_t* offsets) {
  constexpr int kVectors = kGroup / kWidth;
  for (int begin = 0; begin < k; begin += kGroup, q += kGroup) {
    Vec values[kVectors];
    if (k - begin >= kGroup) {
      for (int v = 0; v < kVectors; ++v) values[v] = load(x + begin + v * kWidth);
    } else {
      for (int v = 0; v < kVectors; ++v) {
        const int left = k - begin - v * kWidth;
        values[v] = left > 0 ? load_part(x + begin + v * kWidth, left) : zero();
      }
    }
    Vec most = zero(), sum_of = zero();
    for (int v = 0; v < kVectors; ++v) most = max(most, max(values[v], zero() - values[v]));
    const float magnitude = largest(most);
    const Vec inverse = set(magnitude > kLeast ? 127.f / magnitude : 0.f);
    for (int v = 0; v < kVectors; ++v) {
      const Vec rounded = round(values[v] * inverse);
      store(q + v * kWidth, rounded);
      sum_of = sum_of + rounded;  // exact: integers below 2^24
    }
    const float total = sum(sum_of);
    const bool finite = total == total;
    *scales++ = finite ? magnitude / 127.f : total;
    *offsets++ = finite ? -128 * static_cast<int32_t>(total) : 0;
  }
}

void pack_int8(const void* weight, DType dtype, int columns, int k, void* tile) {
  float* scales = static_cast<float*>(tile);
  auto* bytes = reinterpret_cast<uint8_t*>(scales + kTile);
  memset(bytes, 128, round_up(k, kGroup) * kTile);
  for (int c = 0; c < kTile; ++c) {
    float most = 0;
    const auto value = [&](int i) { return load_one(weight, dtype, static_cast<int64_t>(c) * k + i); };
    bool finite = true;
    for (int i = 0; c < columns && i < k; ++i) {
      const float magnitude = fabsf(value(i));
      most = larger(most, magnitude);
      finite &= isfinite(magnitude) != 0;
    }
    scales[c] = finite ? most / 127.f : __builtin_nanf("");  // and the bytes stand for 0: the column's outputs are NaN
    const float inverse = most > kLeast ? 127.f / most : 0.f;
    for (int i = 0; finite && c < columns && i < k; ++i) {
      bytes[(i / 4 * kTile + c) * 4 + i % 4] = static_cast<uint8_t>(lrintf(value(i) * inverse) + 128);
    }
  }
}

inline int place(float*, int column) { return column; }
inline int place(f16*, int column) { return column; }
inline int place(bf16*, int column) { return 2 * (column % 16) + column / 16; }

template <class W>
void pack_float(const void* weight, DType dtype, int columns, int k, W* tile) {
  if (columns < kTile) memset(tile, 0, static_cast<size_t>(k) * kTile * sizeof(W));
  // A few k at a time for all columns: the tile's lines are then written once.
  for_vectors(k, [&](int i, int lanes) {
    for (int c = 0; c < columns; ++c) {
      W values[kWidth];
      store(values, load_part(weight, dtype, static_cast<int64_t>(c) * k + i, lanes));
      W* target = tile + static_cast<int64_t>(i) * kTile + place(tile, c);
      for (int j = 0; j < lanes; ++j) target[j * kTile] = values[j];
    }
  });
}

}  // namespace

Rows make_rows(const void* x, DType dtype, int64_t row_stride, int rows, int k, WeightFormat format) {
  Rows made = {};
  made.rows = rows;
  made.k = k;
  const bool quantised = format == WeightFormat::packed_int8;
  if (!quantised && dtype == DType::f32) {
    made.x = static_cast<const float*>(x);
    made.row_stride = row_stride;
    return made;
  }
  const int64_t groups = ceil_div(k, kGroup);
  float* wide = scratch_of<float>(Scratch::rows, rows * (groups * kGroup * 2 + groups * 2));
  float* scales = wide + rows * groups * kGroup;
  auto* offsets = reinterpret_cast<int32_t*>(scales + rows * groups);
  auto* bytes = reinterpret_cast<int8_t*>(offsets + rows * groups);
  parallel_for(rows, 0.15 * rows * k, [&](int r) {
    const float* row = static_cast<const float*>(x) + r * row_stride;
    if (dtype != DType::f32) {
      float* target = wide + r * groups * kGroup;
      for_vectors(
          k, [&](int i, int lanes) { store_part(target + i, load_part(x, dtype, r * row_stride + i, lanes), lanes); });
      row = target;
    }
    if (quantised) {
      quantise_row(row, k, bytes + r * groups * kGroup, scales + r * groups, offsets + r * groups);
    }
  });
  made.x = wide;
  made.row_stride = groups * kGroup;
  made.q = bytes;
  made.scales = scales;
  made.offsets = offsets;
  return made;
}

Rows Rows::part(int first, int count) const {
  const int64_t groups = ceil_div(k, kGroup);
  Rows some = *this;
  some.rows = count;
  some.x += first * row_stride;
  if (q) {
    some.q += first * groups * kGroup;
    some.scales += first * groups;
    some.offsets += first * groups;
  }
  return some;
}

int64_t tile_bytes(WeightFormat format, int k) {
  switch (format) {
    case WeightFormat::packed_f32:
      return static_cast<int64_t>(k) * kTile * 4;
    case WeightFormat::packed_int8:
      return kTile * static_cast<int64_t>(sizeof(float)) + round_up(k, kGroup) * kTile;
    default:
      return static_cast<int64_t>(k) * kTile * 2;
  }
}

void pack_tile(const void* weight, DType dtype, int columns, int k, WeightFormat format, void* tile) {
  switch (format) {
    case WeightFormat::packed_f32:
      return pack_float(weight, dtype, columns, k, static_cast<float*>(tile));
    case WeightFormat::packed_bf16:
      return pack_float(weight, dtype, columns, k, static_cast<bf16*>(tile));
    case WeightFormat::packed_f16:
      return pack_float(weight, dtype, columns, k, static_cast<f16*>(tile));
    default:
      return pack_int8(weight, dtype, columns, k, tile);
  }
}

int64_t Matrix::bytes() const {
  const int64_t element = format == WeightFormat::plain_f32 ? 4 : 2;
  return plain() ? element * columns * k : tiles() * tile_bytes(format, k);
}

const void* Matrix::tile(int index) const {
  const int64_t size = tile_bytes(packed_format(), k);
  if (!plain()) return static_cast<const char*>(data) + index * size;
  const DType dtype = static_cast<DType>(format);
  void* packed = scratch(Scratch::tile, size);
  const int first = index * kTile;
  pack_tile(element(data, dtype, static_cast<int64_t>(first) * k), dtype, smaller(kTile, columns - first), k,
            packed_format(), packed);
  return packed;
}

}  // namespace medusa::cpu::MEDUSA_ISA
