// Any processor: four lanes by the compiler's vector extension. Included by simd.h inside its namespaces.

constexpr int kWidth = 4;
constexpr int kRegisters = 16;

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));

struct Vec {
  Floats v;
};

// As in AVX2 and AVX-512, every conversion to 16 bits rounds to the nearest even and keeps NaN.
inline uint16_t round_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float widen_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  uint32_t bits;
  if (rest < 0x400) {  // zero or denormal: rest * 2^-24
    const float value = static_cast<float>(rest) * 5.9604644775390625e-8f;
    memcpy(&bits, &value, 4);
  } else {
    bits = (rest << 13) + (rest >= 0x7c00 ? 0x70000000u : 0x38000000u);
  }
  bits |= sign;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

inline uint16_t round_f16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above round to infinity
  if (bits < 0x38800000) {                                              // below 2^-14: adding 0.5 rounds at 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13));
}

inline Vec zero() { return {Floats{}}; }
inline Vec set(float x) { return {Floats{x, x, x, x}}; }

inline Vec load(const float* p) {
  Vec a;
  memcpy(&a, p, sizeof a);
  return a;
}
inline Vec load(const bf16* p) {
  uint32_t bits[4];
  for (int i = 0; i < 4; ++i) bits[i] = static_cast<uint32_t>(p[i].bits) << 16;
  Vec a;
  memcpy(&a, bits, sizeof a);
  return a;
}
inline Vec load(const f16* p) {
  return {Floats{widen_f16(p[0].bits), widen_f16(p[1].bits), widen_f16(p[2].bits), widen_f16(p[3].bits)}};
}

inline void store(float* p, Vec a) { memcpy(p, &a, sizeof a); }
inline void store(bf16* p, Vec a) {
  for (int i = 0; i < 4; ++i) p[i].bits = round_bf16(a.v[i]);
}
inline void store(f16* p, Vec a) {
  for (int i = 0; i < 4; ++i) p[i].bits = round_f16(a.v[i]);
}

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
// a * b + c, rounded twice: the oldest x86-64 has no fused form
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec round(Vec a) {
  return {Floats{__builtin_rintf(a.v[0]), __builtin_rintf(a.v[1]), __builtin_rintf(a.v[2]), __builtin_rintf(a.v[3])}};
}
// a * 2^n, n integral and between -252 and 254: in two steps, so that denormals round once.
inline Vec scale_by_power(Vec a, Vec n) {
  float powers[2][4];
  for (int i = 0; i < 4; ++i) {
    const int power = n.v[i] == n.v[i] ? static_cast<int>(n.v[i]) : 0, first = power >> 1;
    const uint32_t exponents[2] = {static_cast<uint32_t>(first + 127) << 23, static_cast<uint32_t>(power - first + 127)
                                                                                 << 23};
    memcpy(&powers[0][i], &exponents[0], 4);
    memcpy(&powers[1][i], &exponents[1], 4);
  }
  return a * load(powers[0]) * load(powers[1]);
}
inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float largest(Vec a) {
  const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1], y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return x > y ? x : y;
}
// NaN in the lanes where `a` holds it; the others stay as they were.
inline Vec note_nan(Vec seen, Vec a) { return {a.v == a.v ? seen.v : a.v}; }
inline bool any_at_least(Vec a, Vec b) {
  return a.v[0] >= b.v[0] || a.v[1] >= b.v[1] || a.v[2] >= b.v[2] || a.v[3] >= b.v[3];
}

// 2 * kWidth bf16, of which the even ones and the odd ones make a Vec each.
inline Vec load_pairs(const bf16* p) {
  Vec a;
  memcpy(&a, p, sizeof a);
  return a;
}
inline void split_pairs(Vec pairs, Vec& even, Vec& odd) {
  bf16 p[8];
  memcpy(p, &pairs, sizeof p);
  const bf16 evens[4] = {p[0], p[2], p[4], p[6]}, odds[4] = {p[1], p[3], p[5], p[7]};
  even = load(evens);
  odd = load(odds);
}
// The inverse: lanes in turn from each.
inline void merge_pairs(Vec even, Vec odd, Vec& low, Vec& high) {
  low.v = Floats{even.v[0], odd.v[0], even.v[1], odd.v[1]};
  high.v = Floats{even.v[2], odd.v[2], even.v[3], odd.v[3]};
}

inline void transpose(Vec (&m)[4]) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < i; ++j) {
      const float kept = m[i].v[j];
      m[i].v[j] = m[j].v[i];
      m[j].v[i] = kept;
    }
  }
}

// Rounds to the nearest even; |a| <= 127.
inline void store(int8_t* p, Vec a) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<int8_t>(__builtin_lrintf(a.v[i]));
}

struct IntVec {
  Ints v;
};
struct Bytes {
  uint8_t v[16];
};

// Weights lie as value + 128; `offset` is -128 times the sum of the x.
inline IntVec dot_start(int32_t offset) { return {Ints{offset, offset, offset, offset}}; }
inline Bytes load_bytes(const uint8_t* p) {
  Bytes b;
  memcpy(&b, p, sizeof b);
  return b;
}
inline IntVec dot4(IntVec sum, Bytes w, int32_t x4) {
  int8_t x[4];
  memcpy(x, &x4, 4);
  for (int i = 0; i < 4; ++i) {
    sum.v[i] += w.v[4 * i] * x[0] + w.v[4 * i + 1] * x[1] + w.v[4 * i + 2] * x[2] + w.v[4 * i + 3] * x[3];
  }
  return sum;
}
inline Vec to_float(IntVec a) { return {__builtin_convertvector(a.v, Floats)}; }
