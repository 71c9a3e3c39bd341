// Seeded draws from one row of logits: Philox4x32-10, truncation by top_k and top_p, the inverse CDF. A draw depends on
// its row alone, so a node of a tree and a step of plain sampling draw the same token.
#pragma once
#include "simd.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

// A multiple of 2^-24 in [0, 1).
inline float philox_uniform(uint64_t key, uint64_t counter) {
  uint32_t words[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t keys[2] = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * words[0], second = uint64_t{0xCD9E8D57} * words[2];
    words[0] = static_cast<uint32_t>(second >> 32) ^ words[1] ^ keys[0];
    words[1] = static_cast<uint32_t>(second);
    words[2] = static_cast<uint32_t>(first >> 32) ^ words[3] ^ keys[1];
    words[3] = static_cast<uint32_t>(first);
    keys[0] += 0x9E3779B9;
    keys[1] += 0xBB67AE85;
  }
  return static_cast<float>(words[0] >> 8) * 0x1p-24f;
}

constexpr int kSumSpan = 512;  // floats are summed over this many, spans in double: one order for every row

// Calls body(offset, count, sum of the span) for the spans of `weights`, in order, until it returns true.
template <class Body>
inline void for_spans(const float* weights, int count, const Body& body) {
  for (int begin = 0; begin < count; begin += kSumSpan) {
    const int span = smaller(kSumSpan, count - begin);
    Vec total = zero();
    for_vectors(span, [&](int i, int lanes) { total = total + load_part(weights + begin + i, lanes); });
    if (body(begin, span, static_cast<double>(sum(total)))) return;
  }
}

// scaled[i] = logits[i] / temperature; returns the largest.
inline float scale_row(const void* logits, DType dtype, int vocab, float temperature, float* scaled) {
  Vec most = set(-__builtin_inff());
  const Vec t = set(temperature);
  for_vectors(vocab, [&](int i, int lanes) {
    const Vec value = load_part(logits, dtype, i, lanes) / t;
    store_part(scaled + i, value, lanes);
    most = max(most, first_lanes(value, lanes, -__builtin_inff()));
  });
  return largest(most);
}

// Unsigned integers in the order of the floats; -0 and 0 are one.
inline uint32_t order_of(float x) {
  x += 0.f;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// By falling logit, then rising id, the tokens that stand before the point where `target` of the measure is reached:
// those with a larger key, and the first `ties` of those with this one.
struct Cut {
  uint32_t key;
  int ties;
};

// measure(i): 1 to count tokens, the weight to sum probability. A radix descent over the keys' 11, 11 and 10 bits.
template <class Logit, class Measure>
inline Cut find_cut(int vocab, double target, double* bins, const Logit& logit, const Measure& measure) {
  constexpr int kShifts[4] = {32, 21, 10, 0};
  uint32_t prefix = 0;
  double before = 0;
  for (int level = 1; level < 4; ++level) {
    const int shift = kShifts[level], width = kShifts[level - 1] - shift;
    memset(bins, 0, sizeof(double) << width);
    for (int i = 0; i < vocab; ++i) {
      const uint32_t key = order_of(logit(i));
      if (level > 1 && key >> kShifts[level - 1] != prefix) continue;
      bins[key >> shift & ((1u << width) - 1)] += measure(i);
    }
    int bin = (1 << width) - 1;
    while (bin > 0 && before + bins[bin] < target) before += bins[bin--];
    prefix = prefix << width | static_cast<uint32_t>(bin);
  }
  Cut cut = {prefix, 0};
  for (int i = 0; i < vocab && before < target; ++i) {
    if (order_of(logit(i)) != prefix) continue;
    before += measure(i);
    ++cut.ties;
  }
  return cut;
}

template <class Logit>
inline void apply_cut(Cut cut, int vocab, const Logit& logit, float* weights) {
  for (int i = 0; i < vocab; ++i) {
    const uint32_t key = order_of(logit(i));
    if (key < cut.key || (key == cut.key && cut.ties-- <= 0)) weights[i] = 0;
  }
}

// Draws a token from softmax(logits / temperature) truncated by top_k, then top_p. `memory` holds 2 * vocab floats and
// 2048 doubles.
inline int draw(const void* logits, DType dtype, int vocab, float temperature, float top_p, int top_k, uint64_t seed,
                uint64_t counter, double* memory) {
  double* bins = memory;
  float* raw = reinterpret_cast<float*>(memory + 2048);
  float* weights = raw + vocab;
  const Vec most = set(scale_row(logits, dtype, vocab, temperature, weights));
  for_vectors(vocab, [&](int i, int lanes) {
    store_part(weights + i, exp(load_part(weights + i, lanes) - most), lanes);
    store_part(raw + i, load_part(logits, dtype, i, lanes), lanes);
  });
  const auto logit = [&](int i) { return raw[i]; };
  if (top_k > 0 && top_k < vocab) {
    apply_cut(find_cut(vocab, top_k, bins, logit, [](int) { return 1.0; }), vocab, logit, weights);
  }
  double total = 0;
  const auto add_up = [&] {
    total = 0;
    for_spans(weights, vocab, [&](int, int, double part) {
      total += part;
      return false;
    });
  };
  add_up();
  if (top_p < 1) {
    const auto weight = [&](int i) { return static_cast<double>(weights[i]); };
    apply_cut(find_cut(vocab, top_p * static_cast<float>(total), bins, logit, weight), vocab, logit, weights);
    add_up();
  }

  // Like top_p's, this product is the definition's: rounded to fp32.
  const double limit = philox_uniform(seed, counter) * static_cast<float>(total);
  double running = 0;
  int token = -1;
  for_spans(weights, vocab, [&](int begin, int count, double part) {
    if (running + part > limit) {
      double within = running;
      for (int i = begin; i < begin + count && token < 0; ++i) {
        within += weights[i];
        if (within > limit) token = i;
      }
    }
    running += part;
    return token >= 0;
  });
  if (token >= 0) return token;
  // The limit rounds up to the total when u is just under 1: the last token of positive weight.
  for (token = vocab - 1; token > 0 && !(weights[token] > 0); --token) {
  }
  return token;
}

}  // namespace
}  // namespace medusa::cpu::MEDUSA_ISA
