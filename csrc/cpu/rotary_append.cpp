// Rotary embedding of q in place and of k into the cache, v's append, and the optional norm of each head before.
#include "isa.h"
#include "rms_norm.h"
#include "threads.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

// A head's vector at `from`, normalised where there is a weight, rotated, to `to`; the two may be the same.
void rotate(const RotaryAppendParams& p, const void* from, DType from_dtype, const void* norm, const float* cos,
            const float* sin, void* to, DType to_dtype) {
  float x[kMaxHeadDim];
  const Vec factor = set(norm ? inverse_rms(from, from_dtype, p.head_dim, p.norm_eps) : 1.f);
  for_vectors(p.head_dim, [&](int i, int lanes) {
    Vec value = load_part(from, from_dtype, i, lanes);
    if (norm) value = value * factor * load_part(norm, p.norm_dtype, i, lanes);
    store_part(x + i, value, lanes);
  });
  const int half = p.rotary_dim / 2;
  for_vectors(half, [&](int i, int lanes) {
    const Vec a = load_part(x + i, lanes), b = load_part(x + half + i, lanes);
    const Vec c = load_part(cos + i, lanes), s = load_part(sin + i, lanes);
    store_part(to, to_dtype, i, a * c - b * s, lanes);
    store_part(to, to_dtype, half + i, b * c + a * s, lanes);
  });
  for_vectors(p.head_dim - 2 * half, [&](int i, int lanes) {
    store_part(to, to_dtype, 2 * half + i, load_part(x + 2 * half + i, lanes), lanes);
  });
}

}  // namespace

void rotary_append(const RotaryAppendParams& p) {
  parallel_for(p.batch * p.n, 0.3 * p.batch * p.n * (p.heads + 2 * p.kv_heads) * p.head_dim, [&](int index) {
    const int b = index / p.n, node = index % p.n, start = p.cache_seqlens[b];
    const int64_t position = start + p.depths[b * p.depths_batch_stride + node];
    const float* cos = p.cos + position * (p.rotary_dim / 2);
    const float* sin = p.sin + position * (p.rotary_dim / 2);
    for (int head = 0; head < p.heads; ++head) {
      void* q = element(p.q, p.dtype, b * p.q_batch_stride + node * p.q_row_stride + head * p.q_head_stride);
      rotate(p, q, p.dtype, p.q_norm, cos, sin, q, p.dtype);
    }
    for (int head = 0; head < p.kv_heads; ++head) {
      const int64_t row = b * p.kv_batch_stride + (start + node) * p.kv_row_stride + head * p.kv_head_stride;
      const void* k = element(p.k, p.dtype, b * p.k_batch_stride + node * p.k_row_stride + head * p.k_head_stride);
      rotate(p, k, p.dtype, p.k_norm, cos, sin, element(p.k_cache, p.kv_dtype, row), p.kv_dtype);
      const int64_t v = b * p.v_batch_stride + node * p.v_row_stride + head * p.v_head_stride;
      for_vectors(p.head_dim, [&](int i, int lanes) {
        store_part(p.v_cache, p.kv_dtype, row + i, load_part(p.v, p.dtype, v + i, lanes), lanes);
      });
    }
  });
}

}  // namespace medusa::cpu::MEDUSA_ISA
