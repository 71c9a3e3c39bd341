// One plain struct per op, shared by every native backend. Strides count elements, not bytes.
// The Python front door has checked every field; kernels trust them.
#pragma once
#include <cstdint>

namespace medusa {

// Largest sizes that the front doors let through: kernels have room for so much, and no more.
constexpr int kMaxNodes = 256, kMaxHeadDim = 256;

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

struct TreeAttentionParams {
  const void* q;                 // [batch, n, heads, head_dim], head_dim contiguous
  const void* k_cache;           // [batch, max_seqlen, kv_heads, head_dim], head_dim contiguous
  const void* v_cache;           // as k_cache, same strides
  const int32_t* cache_seqlens;  // [batch]: committed rows; the tree's own rows follow them
  const uint64_t* tree_mask;     // [batch or 1, n, words]
  void* out;                     // [batch, n, heads, head_dim], contiguous, q's dtype
  int64_t q_batch_stride, q_row_stride, q_head_stride;
  int64_t kv_batch_stride, kv_row_stride, kv_head_stride;
  int64_t mask_batch_stride;  // 0: one mask for every sequence
  int32_t batch, n, heads, kv_heads, head_dim, words;
  int32_t max_seqlen;
  float scale;
  DType q_dtype, kv_dtype;
  int32_t row_invariant;  // 1: a node's bits depend on its own keys alone, as they do on the CPU without being asked
};

struct RotaryAppendParams {
  void* q;                       // [batch, n, heads, head_dim], rotated in place
  const void* k;                 // [batch, n, kv_heads, head_dim]
  const void* v;                 // [batch, n, kv_heads, head_dim]
  const float* cos;              // [positions, rotary_dim / 2], contiguous
  const float* sin;              // as cos
  void* k_cache;                 // [batch, max_seqlen, kv_heads, head_dim]: row cache_seqlens[b] + i is written
  void* v_cache;                 // as k_cache, same strides
  const int32_t* cache_seqlens;  // [batch]
  const int32_t* depths;         // [batch or 1, n]: node i stands at position cache_seqlens[b] + depths[i]
  const void* q_norm;            // [head_dim] or null: RMSNorm of each head before the rotation
  const void* k_norm;            // [head_dim] or null
  int64_t q_batch_stride, q_row_stride, q_head_stride;
  int64_t k_batch_stride, k_row_stride, k_head_stride;
  int64_t v_batch_stride, v_row_stride, v_head_stride;
  int64_t kv_batch_stride, kv_row_stride, kv_head_stride;
  int64_t depths_batch_stride;  // 0: one tree for every sequence
  int32_t batch, n, heads, kv_heads, head_dim, rotary_dim;
  float norm_eps;
  DType dtype, kv_dtype, norm_dtype;  // of q, k, v; of the caches; of the norm weights
};

struct RmsNormParams {
  const void* x;       // [rows, hidden]
  void* residual;      // [rows, hidden] or null: residual += x first, and the sum is normalised
  const void* weight;  // [hidden]
  void* out;           // [rows, hidden], contiguous
  int64_t x_row_stride, residual_row_stride;
  int32_t rows, hidden;
  float eps;
  DType dtype, weight_dtype;  // of x, residual and out; of weight
};

struct SiluMulParams {
  const void* gate_up;  // [rows, 2 * ffn]: gate, then up
  void* out;            // [rows, ffn], contiguous
  int64_t row_stride;
  int32_t rows, ffn;
  DType dtype;
};

// How a weight lies in memory. plain_* is row-major [out, in]; packed_* is what pack_linear made.
enum class WeightFormat : int32_t {
  plain_f32 = 0,
  plain_bf16 = 1,
  plain_f16 = 2,
  packed_f32 = 16,
  packed_bf16 = 17,
  packed_f16 = 18,
  packed_int8 = 19
};

struct LinearParams {
  const void* x;         // [rows, in_features], in_features contiguous
  const void* weight;    // [out_features, in_features] contiguous, or a packed block (weight_format)
  const void* bias;      // [out_features] or null
  const void* residual;  // [rows, out_features] or null; may be out itself
  void* out;             // [rows, out_features]
  int64_t x_row_stride, residual_row_stride, out_row_stride;
  int32_t rows, in_features, out_features;
  DType dtype, bias_dtype;  // of x, residual and out; of bias
  WeightFormat weight_format;
};

struct DraftHeadsParams {
  const void* hidden;          // [batch, hidden_size], hidden_size contiguous
  const void* block_weight;    // [heads, layers, hidden, hidden] contiguous, or packed
  const void* block_bias;      // [heads, layers, hidden] or null
  const void* lm_head_weight;  // [vocab, hidden] shared or [heads, vocab, hidden], contiguous, or packed
  const int32_t* token_map;    // [vocab] or null: draft id -> base id
  int32_t* draft_tokens;       // [batch, heads, top_k]
  float* logprobs;             // [batch, heads, top_k]
  int64_t hidden_row_stride;
  int32_t batch, heads, layers, hidden_size, vocab, top_k;
  int32_t own_lm_heads;  // 1: lm_head_weight has one matrix per head
  DType dtype, bias_dtype;
  WeightFormat block_format, lm_head_format;
};

enum class VerifyMode : int32_t { greedy = 0, typical = 1, lossless = 2 };

struct VerifyTreeParams {
  const void* logits;          // [batch, n, vocab], vocab contiguous
  const int32_t* tree_tokens;  // [batch, n]
  const int32_t* parents;      // [batch or 1, n]
  // Per sequence; all null: every sequence is greedy.
  const int32_t* mode;               // [batch] VerifyMode
  const float* temperature;          // [batch]
  const float* top_p;                // [batch]
  const int32_t* top_k;              // [batch], 0 = off
  const float* posterior_threshold;  // [batch]
  const float* posterior_alpha;      // [batch]
  const int64_t* seed;               // [batch]
  const int64_t* offset;             // [batch]: absolute position of the root
  int32_t* accepted_nodes;           // [batch, max_depth + 1]
  int32_t* accept_length;            // [batch]
  int32_t* next_token;               // [batch]
  int64_t logits_batch_stride, logits_row_stride;
  int64_t parents_batch_stride;  // 0: one tree for every sequence
  int32_t batch, n, vocab, max_depth;
  DType dtype;
};

struct VerifyLmHeadParams {
  const void* hidden;          // [batch, n, hidden_size], contiguous
  const void* lm_head_weight;  // [vocab, hidden_size] contiguous, or packed
  VerifyTreeParams tree;  // dtype: hidden's, to which a logit is rounded; logits, top_p and top_k are not looked at
  int32_t hidden_size;
  WeightFormat lm_head_format;
};

struct CompactKvParams {
  void* kv_cache;  // [layers, 2, batch, max_seqlen, kv_heads, head_dim], a row's [kv_heads, head_dim] contiguous
  const int32_t* accepted_nodes;  // [batch, width]
  const int32_t* accept_length;   // [batch]
  const int32_t* cache_seqlens;   // [batch]
  int64_t layer_stride, kv_stride, batch_stride, row_stride;
  int32_t layers, batch, width;
  int32_t row_bytes;     // kv_heads * head_dim * element size
  int32_t element_size;  // bytes
};

}  // namespace medusa
