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

// A row is summed span by span: inside a span in fp32, relative to the span's own largest logit, and from span to span
// in double. So a span's sums do not wait for the rest of the row, and every row has one order.
constexpr int kSumSpan = 512;

// `most` is the largest logit / temperature. A weight is exp(logit / temperature - most).
struct SpanSum {
  float most;
  float total;     // of the weights
  float products;  // of weight * (logit / temperature - most)
};

inline int spans_of(int vocab) { return static_cast<int>(ceil_div(vocab, kSumSpan)); }
inline int span_length(int vocab, int span) { return smaller(kSumSpan, vocab - span * kSumSpan); }

constexpr float kLargest = 3.402823466e38f;  // of the finite floats

// The weights and sums of `count` logits from the one at `first` on.
inline SpanSum weigh_span(const void* logits, DType dtype, int64_t first, int count, float temperature,
                          float* weights) {
  Vec most = set(-__builtin_inff());
  const Vec t = set(temperature);
  for_vectors(count, [&](int i, int lanes) {
    const Vec value = load_part(logits, dtype, first + i, lanes) / t;
    store_part(weights + i, value, lanes);
    most = max(first_lanes(value, lanes, -__builtin_inff()), most);
  });
  // Infinity less infinity would be NaN: a logit of infinity weighs 1 and all others nothing, and NaN stays NaN. Where
  // exp is 0 the product must be 0 too, not 0 times infinity.
  const Vec shift = min(max(set(largest(most)), set(-kLargest)), set(kLargest)), least = set(-104.f);
  Vec total = zero(), products = zero();
  for_vectors(count, [&](int i, int lanes) {
    const Vec shifted = max(least, min(zero(), load_part(weights + i, lanes) - shift));
    const Vec weight = first_lanes(exp(shifted), lanes, 0.f);
    store_part(weights + i, weight, lanes);
    total = total + weight;
    products = products + weight * shifted;
  });
  return {largest(most), sum(total), sum(products)};
}

inline float most_of(const SpanSum* spans, int count) {
  float most = spans[0].most;
  for (int s = 1; s < count; ++s) most = larger(most, spans[s].most);
  return most;
}

// What the weights of a span count beside those of the span with the row's largest logit.
inline double scale_of(const SpanSum& span, float most) { return span.most == most ? 1 : exp(span.most - most); }

// The first id at which the running sum of the weights exceeds u times their total, else the last of positive weight;
// the last id of all where there is no distribution. weights_of(span) points to a span's weights.
template <class WeightsOf>
inline int find_token(const SpanSum* spans, int vocab, float u, const WeightsOf& weights_of) {
  const int count = spans_of(vocab);
  const float most = most_of(spans, count);
  double total = 0;
  for (int s = 0; s < count; ++s) total += spans[s].total * scale_of(spans[s], most);
  if (!(total > 0)) return vocab - 1;
  // Like top_p's, this product is the definition's: rounded to fp32.
  const double limit = u * static_cast<float>(total);
  double sum = 0, before = 0;
  int chosen = 0;
  for (int s = 0; s < count && !(sum > limit); ++s) {
    const double part = spans[s].total * scale_of(spans[s], most);
    if (part > 0) {
      chosen = s;
      before = sum;
    }
    sum += part;
  }
  const float* weights = weights_of(chosen);
  const double scale = scale_of(spans[chosen], most);
  int token = 0;
  for (int i = 0; i < span_length(vocab, chosen) && !(before > limit); ++i) {
    if (!(weights[i] > 0)) continue;
    token = i;
    before += weights[i] * scale;
  }
  return chosen * kSumSpan + token;
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

constexpr int kBins = 2048;
constexpr double kNearly = 1 - 0x1p-20;  // of top_p: a set short of it by rounding alone has reached it

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

// Sets the weights of what top_k, then top_p leave out to 0, and mends the spans' totals.
inline void truncate(const float* logits, int vocab, float top_p, int top_k, float* weights, SpanSum* spans,
                     double* bins) {
  const int count = spans_of(vocab);
  double* scales = bins + kBins;
  const float most = most_of(spans, count);
  for (int s = 0; s < count; ++s) scales[s] = scale_of(spans[s], most);
  const auto logit = [&](int i) { return logits[i]; };
  const auto cut = [&](double target, const auto& measure) {
    apply_cut(find_cut(vocab, target, bins, logit, measure), vocab, logit, weights);
    for (int s = 0; s < count; ++s) {
      Vec total = zero();
      const float* own = weights + s * kSumSpan;
      for_vectors(span_length(vocab, s), [&](int i, int lanes) { total = total + load_part(own + i, lanes); });
      spans[s].total = sum(total);
    }
  };
  if (top_k > 0 && top_k < vocab) cut(top_k, [](int) { return 1.0; });
  if (top_p < 1) {
    double total = 0;
    for (int s = 0; s < count; ++s) total += spans[s].total * scales[s];
    cut(kNearly * top_p * static_cast<float>(total), [&](int i) { return weights[i] * scales[i / kSumSpan]; });
  }
}

// Bytes that draw works in.
inline size_t draw_bytes(int vocab) {
  return kBins * sizeof(double) + vocab * 2 * sizeof(float) + spans_of(vocab) * (sizeof(double) + sizeof(SpanSum));
}

// Draws a token from softmax(logits / temperature) truncated by top_k, then top_p.
inline int draw(const void* logits, DType dtype, int vocab, float temperature, float top_p, int top_k, uint64_t seed,
                uint64_t counter, void* memory) {
  const int count = spans_of(vocab);
  auto* doubles = static_cast<double*>(memory);  // find_cut's bins, then a scale per span
  float* weights = reinterpret_cast<float*>(doubles + kBins + count);
  float* raw = weights + vocab;
  auto* spans = reinterpret_cast<SpanSum*>(raw + vocab);
  for (int s = 0; s < count; ++s) {
    const int first = s * kSumSpan;
    spans[s] = weigh_span(logits, dtype, first, span_length(vocab, s), temperature, weights + first);
  }
  if ((top_k > 0 && top_k < vocab) || top_p < 1) {
    for_vectors(vocab, [&](int i, int lanes) { store_part(raw + i, load_part(logits, dtype, i, lanes), lanes); });
    truncate(raw, vocab, top_p, top_k, weights, spans, doubles);
  }
  return find_token(spans, vocab, philox_uniform(seed, counter), [&](int s) { return weights + s * kSumSpan; });
}

}  // namespace
}  // namespace medusa::cpu::MEDUSA_ISA
