#include "matmul.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

constexpr int kStrips = 16 / kWidth;  // a strip: the columns of a vector and those 16 further on
// What a pass over a tile prefetches. With few rows a pass waits for memory, which the processor's own prefetcher feeds
// best; with many it computes, and far lines arrive meanwhile. In between, that prefetcher follows but stops at the end
// of every page: the first lines of the next one start it again. Zen 4, GB/s of a core at 1, 4 and 8 rows of bf16: none
// 28, 20, 11; near 27, 23, 13; far 21, 23, 14. int8: none 28, 27, 15.5; far 21, 20, 16.5, and at 16 rows 8.0
// against 9.1. int8 on two cores at 4, 6, 8 rows: none 30.6, 28.4, -; page 33.0, 30.7, 26.3; far -, -, 27.2.
// Zen 3 with AVX2, ms of a whole int8 step of 1 and 2 nodes: none 14.2, 15.3; page 15.5, 16.2; near 12.5, 13.3.
// Where a span of the tile takes several passes, memory would rest in all but the first: each of them then fetches its
// share of the next span. A share is a run of lines: every n-th line instead, and memory brings half as much. Zen 3, ms
// of a whole bf16 step of 4, 6, 8 nodes: the tile pass by pass, every n-th line far ahead 30.8, 32.4, 42.9; so 22.2,
// 26.4, 25.1.
enum class Fetch { none, near, page, far, share };
constexpr int kNear = 4 * 1024, kFar = 128 * 1024;  // bytes ahead, into the first and the second cache
constexpr int kSpanBytes = 12 * 1024;               // of a tile that takes several passes: well inside the first cache
constexpr int kPage = 4 * 1024, kFirstLines = 8;
constexpr int kLine = 64;

// How many rows share a weight load: the sums must fit the registers, with some left for weights and a broadcast.
constexpr int kFloatRows = kRegisters == 32 ? 12 : 6;
constexpr int kInt8Rows = kRegisters == 32 ? 8 : 4;

inline void load_strip(const float* p, int strip, Vec& low, Vec& high) {
  low = load(p + strip * kWidth);
  high = load(p + 16 + strip * kWidth);
}
inline void load_strip(const f16* p, int strip, Vec& low, Vec& high) {
  low = load(p + strip * kWidth);
  high = load(p + 16 + strip * kWidth);
}
inline void load_strip(const bf16* p, int strip, Vec& low, Vec& high) {
  split_pairs(load_pairs(p + strip * 2 * kWidth), low, high);
}

// What a pass fetches with Fetch::share: lines in a row, so many at each look ahead.
struct Share {
  const char* next;
  int lines;
};

template <Fetch fetch, int kBytes>
inline void fetch_ahead(const void* p, Share& share) {
  const char* at = static_cast<const char*>(p);
  if (fetch == Fetch::share) {
    for (int line = 0; line < share.lines; ++line, share.next += kLine) __builtin_prefetch(share.next, 0, 3);
    return;
  }
#pragma GCC unroll 8
  for (int b = 0; b < kBytes; b += kLine) {
    if (fetch == Fetch::near) __builtin_prefetch(at + kNear + b, 0, 3);
    if (fetch == Fetch::page && reinterpret_cast<uintptr_t>(at + b) % kPage < kFirstLines * kLine) {
      __builtin_prefetch(at + kPage + b, 0, 2);
    }
    if (fetch == Fetch::far) __builtin_prefetch(at + kFar + b, 0, 2);
  }
}

// Pass `pass` of `passes` over these bytes, kStep between two looks ahead.
template <int kStep>
inline Share share_of(const void* p, int bytes, int pass, int passes) {
  const int first = bytes / kLine * pass / passes;
  return {static_cast<const char*>(p) + kSpanBytes + first * kLine, static_cast<int>(ceil_div(kStep / kLine, passes))};
}

// Bytes of a tile between two looks ahead.
template <class W>
constexpr int kFloatStep = 4 * kTile * static_cast<int>(sizeof(W));
constexpr int kInt8Step = 16 * kTile;

// Part [begin, end) of the sums over k.
struct Span {
  int begin, end;
};

// The sums of R rows and the strips [strip, strip + S), as far as they got: `out` holds them from span to span.
template <int R, int S>
inline void begin_sums(Vec (&sums)[R][2 * S], Span span, int strip, const float* out, int64_t ld) {
  for (int r = 0; r < R; ++r) {
    for (int s = 0; s < S; ++s) {
      const float* at = out + r * ld + (strip + s) * kWidth;
      sums[r][2 * s] = span.begin ? load(at) : zero();
      sums[r][2 * s + 1] = span.begin ? load(at + 16) : zero();
    }
  }
}

// R rows times the strips [strip, strip + S) of a tile.
template <class W, int R, int S, Fetch fetch>
[[gnu::noinline]] void float_kernel(const W* w, const float* x, int64_t stride, Span span, int strip, Share share,
                                    float* out, int64_t ld) {
  Vec sums[R][2 * S];
  begin_sums<R, S>(sums, span, strip, out, ld);
  const auto step = [&](const W* weights, const float* column) __attribute__((always_inline)) {
    Vec wide[2 * S];
    for (int s = 0; s < S; ++s) load_strip(weights, strip + s, wide[2 * s], wide[2 * s + 1]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec a = set(column[r * stride]);
#pragma GCC unroll 8
      for (int c = 0; c < 2 * S; ++c) sums[r][c] = fma(wide[c], a, sums[r][c]);
    }
  };
  int i = span.begin;
  for (; i + 4 <= span.end; i += 4) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) step(w + (i + u) * kTile, x + i + u);
    fetch_ahead<fetch, kFloatStep<W>>(w + i * kTile, share);
  }
  for (; i < span.end; ++i) step(w + i * kTile, x + i);
  for (int r = 0; r < R; ++r) {
    for (int s = 0; s < S; ++s) {
      store(out + r * ld + (strip + s) * kWidth, sums[r][2 * s]);
      store(out + r * ld + 16 + (strip + s) * kWidth, sums[r][2 * s + 1]);
    }
  }
}

// As float_kernel: exact integer sums inside a group, floats from group to group.
template <int R, int S, Fetch fetch>
[[gnu::noinline]] void int8_kernel(const uint8_t* tile, const Rows& rows, int row, Span span, int strip, Share share,
                                   float* out, int64_t ld) {
  const int groups = static_cast<int>(ceil_div(rows.k, kGroup));
  const int64_t stride = static_cast<int64_t>(groups) * kGroup;
  const uint8_t* w = tile + kTile * (sizeof(float) + span.begin);
  const int8_t* q = rows.q + row * stride + span.begin;
  Vec sums[R][2 * S];
  begin_sums<R, S>(sums, span, strip, out, ld);
  for (int g = span.begin / kGroup; g * kGroup < span.end; ++g) {
    IntVec part[R][2 * S];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int32_t offset = rows.offsets[(row + r) * static_cast<int64_t>(groups) + g];
#pragma GCC unroll 8
      for (int c = 0; c < 2 * S; ++c) part[r][c] = dot_start(offset);
    }
#pragma GCC unroll 1  // unrolled further, the compiler loads out of order, which the prefetcher does not follow
    for (int i = 0; i < kGroup; i += 16) {
      fetch_ahead<fetch, kInt8Step>(w, share);
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        Bytes bytes[2 * S];
        for (int s = 0; s < S; ++s) {
          bytes[2 * s] = load_bytes(w + (strip + s) * 4 * kWidth);
          bytes[2 * s + 1] = load_bytes(w + 64 + (strip + s) * 4 * kWidth);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          int32_t four;
          memcpy(&four, q + r * stride + i + 4 * u, 4);
#pragma GCC unroll 8
          for (int c = 0; c < 2 * S; ++c) part[r][c] = dot4(part[r][c], bytes[c], four);
        }
        w += 4 * kTile;
      }
    }
    q += kGroup;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec scale = set(rows.scales[(row + r) * static_cast<int64_t>(groups) + g]);
#pragma GCC unroll 8
      for (int c = 0; c < 2 * S; ++c) sums[r][c] = fma(to_float(part[r][c]), scale, sums[r][c]);
    }
  }
  const float* scales = reinterpret_cast<const float*>(tile);
  const bool done = span.end == rows.k;
  for (int r = 0; r < R; ++r) {
    for (int s = 0; s < S; ++s) {
      const int column = (strip + s) * kWidth;
      const Vec low = sums[r][2 * s], high = sums[r][2 * s + 1];
      store(out + r * ld + column, done ? low * load(scales + column) : low);
      store(out + r * ld + 16 + column, done ? high * load(scales + 16 + column) : high);
    }
  }
}

// Some of a tile's rows: block `index` of `count`.
struct Block {
  int row, index, count;
};

// Few rows leave registers for every strip of the tile at once; many go strip by strip.
constexpr bool takes_all_strips(int rows, int most) { return rows * kStrips <= most; }

template <class W, int R>
void float_block(const W* tile, const Rows& rows, Block block, Span span, float* out, int64_t ld) {
  constexpr int kAtOnce = takes_all_strips(R, kFloatRows) ? kStrips : 1, kPasses = kStrips / kAtOnce;
  constexpr Fetch kAlone = R < 4 ? Fetch::near : Fetch::far;
  const float* x = rows.x + block.row * rows.row_stride;
  out += block.row * ld;
  const int passes = block.count * kPasses;
  const auto kernel = passes == 1 ? float_kernel<W, R, kAtOnce, kAlone> : float_kernel<W, R, kAtOnce, Fetch::share>;
  for (int pass = 0; pass < kPasses; ++pass) {
    const int bytes = (span.end - span.begin) * kTile * static_cast<int>(sizeof(W));
    const Share share = share_of<kFloatStep<W>>(tile + span.begin * kTile, bytes, block.index * kPasses + pass, passes);
    kernel(tile, x, rows.row_stride, span, pass * kAtOnce, share, out, ld);
  }
}

template <int R>
void int8_block(const uint8_t* tile, const Rows& rows, Block block, Span span, float* out, int64_t ld) {
  constexpr int kAtOnce = takes_all_strips(R, kInt8Rows) ? kStrips : 1, kPasses = kStrips / kAtOnce;
  constexpr Fetch kFew = kRegisters == 32 ? Fetch::none : Fetch::near;
  constexpr Fetch kAlone = R <= 2 ? kFew : R <= 6 ? Fetch::page : Fetch::far;
  out += block.row * ld;
  const int passes = block.count * kPasses;
  const auto kernel = passes == 1 ? int8_kernel<R, kAtOnce, kAlone> : int8_kernel<R, kAtOnce, Fetch::share>;
  for (int pass = 0; pass < kPasses; ++pass) {
    const int bytes = (span.end - span.begin) * kTile;
    const Share share = share_of<kInt8Step>(tile + span.begin * kTile, bytes, block.index * kPasses + pass, passes);
    kernel(tile, rows, block.row, span, pass * kAtOnce, share, out, ld);
  }
}

// Calls body with R = `count` as a compile-time constant, 1 <= count <= kMost.
template <int kMost, class Body>
inline void with_count(int count, const Body& body) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_count<kMost - 1>(count, body);
  }
  body(Count<kMost>());
}

// Calls body(count, block) for blocks of nearly equal size: 16 rows are 8 + 8, not 12 + 4.
template <int kMost, class Body>
inline void for_row_blocks(int rows, const Body& body) {
  const int blocks = static_cast<int>(ceil_div(rows, kMost));
  for (int b = 0; b < blocks; ++b) {
    const int row = static_cast<int>(static_cast<int64_t>(rows) * b / blocks);
    const int next = static_cast<int>(static_cast<int64_t>(rows) * (b + 1) / blocks);
    with_count<kMost>(next - row, [&](auto count) { body(count, Block{row, b, blocks}); });
  }
}

// Calls body(count, block, span). One pass goes through the tile at once. Several go through one span after the other:
// memory then brings a single stream, and all passes but the first find their weights in the first cache.
template <int kMost, int kElement, class Body>
inline void for_blocks(const Rows& rows, const Body& body) {
  constexpr int kSpan = kSpanBytes / (kTile * kElement);
  static_assert(kSpan % (kElement == 1 ? kGroup : 4) == 0);
  const int length = takes_all_strips(rows.rows, kMost) ? rows.k : kSpan;
  for (int begin = 0; begin < rows.k; begin += length) {
    const Span span = {begin, smaller(begin + length, rows.k)};
    for_row_blocks<kMost>(rows.rows, [&](auto count, Block block) { body(count, block, span); });
  }
}

template <class W>
void multiply_float(const Rows& rows, const void* tile, float* out, int64_t ld) {
  for_blocks<kFloatRows, sizeof(W)>(rows, [&](auto count, Block block, Span span) {
    float_block<W, decltype(count)::value>(static_cast<const W*>(tile), rows, block, span, out, ld);
  });
}

void multiply_int8(const Rows& rows, const void* tile, float* out, int64_t ld) {
  for_blocks<kInt8Rows, 1>(rows, [&](auto count, Block block, Span span) {
    int8_block<decltype(count)::value>(static_cast<const uint8_t*>(tile), rows, block, span, out, ld);
  });
}

}  // namespace

void multiply_tile(const Rows& rows, WeightFormat format, const void* tile, float* out, int64_t ld) {
  switch (format) {
    case WeightFormat::packed_f32:
      return multiply_float<float>(rows, tile, out, ld);
    case WeightFormat::packed_bf16:
      return multiply_float<bf16>(rows, tile, out, ld);
    case WeightFormat::packed_f16:
      return multiply_float<f16>(rows, tile, out, ld);
    default:
      return multiply_int8(rows, tile, out, ld);
  }
}

}  // namespace medusa::cpu::MEDUSA_ISA
