// Every op once, on random data in buffers of the exact size.
#include "cpu/ops.h"

#include <algorithm>

#include "check.h"

namespace medusa::sanitize {
namespace {

constexpr DType kFloats[] = {DType::f32, DType::bf16, DType::f16};

Buffer ints(const std::vector<int32_t>& values) {
  Buffer made(values.size() * sizeof(int32_t));
  std::copy(values.begin(), values.end(), made.at<int32_t>());
  return made;
}

// parents of a random tree of n nodes, and its mask of one word a row
struct Tree {
  Buffer parents, mask;
  int depth = 0;

  Tree(Random& random, int n) : parents(n * sizeof(int32_t)), mask(n * sizeof(uint64_t)) {
    std::vector<int> depths(n, 0);
    for (int i = 0; i < n; ++i) {
      const int parent = i ? static_cast<int>(random.below(i)) : -1;
      parents.at<int32_t>()[i] = parent;
      mask.at<uint64_t>()[i] = (i ? mask.at<uint64_t>()[parent] : 0) | uint64_t{1} << i;
      depths[i] = i ? depths[parent] + 1 : 0;
      depth = std::max(depth, depths[i]);
    }
  }
};

Buffer packed(const Buffer& weight, DType dtype, int matrices, int out, int in, WeightFormat format) {
  Buffer made(cpu::packed_bytes(matrices, out, in, format));
  cpu::pack(weight.data(), made.data(), matrices, out, in, dtype, format);
  return made;
}

void linear(Random& random, DType dtype, Outputs& outputs) {
  const int rows = 1 + random.below(30), in = 1 + random.below(200), out = 1 + random.below(300);
  const Buffer x = random.values(dtype, rows * in), weight = random.values(dtype, out * in);
  const Buffer bias = random.values(DType::f32, out), residual = random.values(dtype, rows * out);
  const auto plain = static_cast<WeightFormat>(dtype);
  for (const WeightFormat format : {plain, WeightFormat::packed_f32, WeightFormat::packed_bf16,
                                    WeightFormat::packed_f16, WeightFormat::packed_int8}) {
    Buffer made(rows * out * element_size(dtype));
    const Buffer block = packed(weight, dtype, 1, out, in, format == plain ? WeightFormat::packed_f32 : format);
    cpu::linear({x.data(), format == plain ? weight.data() : block.data(), bias.data(), residual.data(), made.data(),
                 in, out, out, rows, in, out, dtype, DType::f32, format});
    outputs.push_back(std::move(made));
  }
}

void draft_heads(Random& random, DType dtype, Outputs& outputs) {
  const int batch = 1 + random.below(3), heads = 1 + random.below(3), hidden = 1 + random.below(90);
  const int vocab = 100 + random.below(400), own = random.below(2);
  const int matrices = own ? heads : 1;
  const Buffer x = random.values(dtype, batch * hidden), bias = random.values(dtype, heads * hidden);
  const Buffer blocks = random.values(dtype, heads * hidden * hidden);
  const Buffer lm_head = random.values(dtype, static_cast<size_t>(matrices) * vocab * hidden);
  const auto plain = static_cast<WeightFormat>(dtype);
  for (const WeightFormat format : {plain, WeightFormat::packed_bf16, WeightFormat::packed_int8}) {
    const bool pack = format != plain;
    const WeightFormat target = pack ? format : WeightFormat::packed_f32;
    const Buffer packed_blocks = packed(blocks, dtype, heads, hidden, hidden, target);
    const Buffer packed_head = packed(lm_head, dtype, matrices, vocab, hidden, target);
    for (const int top_k : {1, 7, 80}) {
      Buffer tokens(batch * heads * top_k * sizeof(int32_t)), logprobs(batch * heads * top_k * sizeof(float));
      cpu::draft_heads({x.data(), pack ? packed_blocks.data() : blocks.data(), bias.data(),
                        pack ? packed_head.data() : lm_head.data(), nullptr, tokens.at<int32_t>(), logprobs.at<float>(),
                        hidden, batch, heads, 1, hidden, vocab, top_k, own, dtype, dtype, format, format});
      outputs.push_back(std::move(tokens));
      outputs.push_back(std::move(logprobs));
    }
  }
}

void attention(Random& random, DType dtype, DType kv_dtype, int longest, Outputs& outputs) {
  const int batch = 1 + random.below(2), n = 1 + random.below(20), kv_heads = 1 + random.below(3);
  const int heads = kv_heads * (1 + random.below(3)), dim = random.below(2) ? 64 : 1 + random.below(100);
  std::vector<int32_t> lengths, depths(n);
  for (int b = 0; b < batch; ++b) lengths.push_back(random.below(longest));
  const int most = *std::max_element(lengths.begin(), lengths.end()), max_seqlen = most + n;
  const Tree tree(random, n);
  for (int i = 1; i < n; ++i) depths[i] = depths[tree.parents.at<int32_t>()[i]] + 1;
  const Buffer seqlens = ints(lengths), node_depths = ints(depths);
  const Buffer q = random.values(dtype, batch * n * heads * dim), norm = random.values(DType::f32, dim);
  const Buffer k = random.values(dtype, batch * n * kv_heads * dim),
               v = random.values(dtype, batch * n * kv_heads * dim);
  const size_t cache = static_cast<size_t>(batch) * max_seqlen * kv_heads * dim;
  Buffer k_cache = random.values(kv_dtype, cache), v_cache = random.values(kv_dtype, cache);
  const int rotary = dim / 2 * 2;
  const Buffer cosines = random.values(DType::f32, max_seqlen * (rotary / 2) + 1);
  const Buffer sines = random.values(DType::f32, max_seqlen * (rotary / 2) + 1);
  const int64_t q_row = heads * dim, kv_row = kv_heads * dim, kv_batch = kv_row * max_seqlen;

  RotaryAppendParams append = {};
  append.q = q.data(), append.k = k.data(), append.v = v.data();
  append.cos = cosines.at<float>(), append.sin = sines.at<float>();
  append.k_cache = k_cache.data(), append.v_cache = v_cache.data();
  append.cache_seqlens = seqlens.at<int32_t>(), append.depths = node_depths.at<int32_t>();
  append.q_norm = append.k_norm = random.below(2) ? norm.data() : nullptr;
  append.q_batch_stride = n * q_row, append.q_row_stride = q_row, append.q_head_stride = dim;
  append.k_batch_stride = append.v_batch_stride = n * kv_row;
  append.k_row_stride = append.v_row_stride = kv_row, append.k_head_stride = append.v_head_stride = dim;
  append.kv_batch_stride = kv_batch, append.kv_row_stride = kv_row, append.kv_head_stride = dim;
  append.batch = batch, append.n = n, append.heads = heads, append.kv_heads = kv_heads;
  append.head_dim = dim, append.rotary_dim = rotary, append.norm_eps = 1e-5f;
  append.dtype = dtype, append.kv_dtype = kv_dtype, append.norm_dtype = DType::f32;
  cpu::rotary_append(append);

  Buffer out(batch * n * q_row * element_size(dtype));
  cpu::tree_attention({q.data(),
                       k_cache.data(),
                       v_cache.data(),
                       seqlens.at<int32_t>(),
                       tree.mask.at<uint64_t>(),
                       out.data(),
                       n * q_row,
                       q_row,
                       dim,
                       kv_batch,
                       kv_row,
                       dim,
                       0,
                       batch,
                       n,
                       heads,
                       kv_heads,
                       dim,
                       1,
                       max_seqlen,
                       0.125f,
                       dtype,
                       kv_dtype});
  outputs.push_back(std::move(out));
  outputs.push_back(std::move(k_cache));
  outputs.push_back(std::move(v_cache));
}

void rows(Random& random, DType dtype, Outputs& outputs) {
  const int count = 1 + random.below(20), hidden = 1 + random.below(600);
  const Buffer x = random.values(dtype, count * 2 * hidden), weight = random.values(DType::f32, hidden);
  Buffer residual = random.values(dtype, count * hidden);
  Buffer normed(count * hidden * element_size(dtype)), gated(count * hidden * element_size(dtype));
  cpu::silu_mul({x.data(), gated.data(), 2 * hidden, count, hidden, dtype});
  cpu::rms_norm({x.data(), residual.data(), weight.data(), normed.data(), 2 * hidden, hidden, count, hidden, 1e-5f,
                 dtype, DType::f32});
  outputs.push_back(std::move(residual));
  outputs.push_back(std::move(normed));
  outputs.push_back(std::move(gated));
}

// The same tree and modes, judged by a random LM head.
void verify_lm_head(Random& random, VerifyTreeParams tree, Outputs& outputs) {
  const int hidden = 1 + random.below(90);
  const Buffer x = random.values(tree.dtype, tree.batch * tree.n * hidden);
  const Buffer weight = random.values(tree.dtype, static_cast<size_t>(tree.vocab) * hidden);
  const auto plain = static_cast<WeightFormat>(tree.dtype);
  for (const WeightFormat format : {plain, WeightFormat::packed_bf16, WeightFormat::packed_int8}) {
    const bool pack = format != plain;
    const Buffer block = packed(weight, tree.dtype, 1, tree.vocab, hidden, pack ? format : WeightFormat::packed_f32);
    Buffer accepted(tree.batch * (tree.max_depth + 1) * 4), length(tree.batch * 4), next(tree.batch * 4);
    tree.logits = nullptr;
    tree.accepted_nodes = accepted.at<int32_t>();
    tree.accept_length = length.at<int32_t>();
    tree.next_token = next.at<int32_t>();
    cpu::verify_lm_head({x.data(), pack ? block.data() : weight.data(), tree, hidden, format});
    outputs.push_back(std::move(accepted));
    outputs.push_back(std::move(length));
    outputs.push_back(std::move(next));
  }
}

void verify(Random& random, DType dtype, Outputs& outputs) {
  const int batch = 3, n = 1 + random.below(20), vocab = 2 + random.below(3000), hidden_bytes = 6;
  const Tree tree(random, n);
  const int width = tree.depth + 1;
  const Buffer logits = random.values(dtype, static_cast<size_t>(batch) * n * vocab);
  std::vector<int32_t> ids(batch * n);
  for (int32_t& id : ids) id = random.below(vocab);
  const Buffer tokens = ints(ids), mode = ints({0, 1, 2}), top_k = ints({0, 5, 0});
  const Buffer numbers = random.values(DType::f32, batch);
  for (int b = 0; b < batch; ++b) numbers.at<float>()[b] = 0.5f;
  Buffer seed(batch * sizeof(int64_t)), accepted(batch * width * 4), length(batch * 4), next(batch * 4);
  const Buffer start = ints({0, 3, 7});
  std::fill_n(seed.at<int64_t>(), batch, 7);
  const VerifyTreeParams params = {logits.data(),
                                   tokens.at<int32_t>(),
                                   tree.parents.at<int32_t>(),
                                   mode.at<int32_t>(),
                                   numbers.at<float>(),
                                   numbers.at<float>(),
                                   top_k.at<int32_t>(),
                                   numbers.at<float>(),
                                   numbers.at<float>(),
                                   seed.at<int64_t>(),
                                   seed.at<int64_t>(),
                                   accepted.at<int32_t>(),
                                   length.at<int32_t>(),
                                   next.at<int32_t>(),
                                   static_cast<int64_t>(n) * vocab,
                                   vocab,
                                   0,
                                   batch,
                                   n,
                                   vocab,
                                   tree.depth,
                                   dtype};
  cpu::verify_tree(params);
  verify_lm_head(random, params, outputs);
  const int layers = 3, max_seqlen = 7 + n;
  Buffer cache = random.values(DType::bf16, static_cast<size_t>(layers) * 2 * batch * max_seqlen * hidden_bytes / 2);
  const int64_t row = hidden_bytes / 2, sequence = row * max_seqlen;
  cpu::compact_kv({cache.data(), accepted.at<int32_t>(), length.at<int32_t>(), start.at<int32_t>(),
                   2 * batch * sequence, batch * sequence, sequence, row, layers, batch, width, hidden_bytes, 2});
  outputs.push_back(std::move(accepted));
  outputs.push_back(std::move(length));
  outputs.push_back(std::move(next));
  outputs.push_back(std::move(cache));
}

}  // namespace

Outputs launch_everything(uint32_t seed) {
  Random random(seed);
  Outputs outputs;
  for (const DType dtype : kFloats) {
    linear(random, dtype, outputs);
    draft_heads(random, dtype, outputs);
    rows(random, dtype, outputs);
    verify(random, dtype, outputs);
    for (const DType kv_dtype : kFloats) {
      for (const int longest : {20, 700}) attention(random, dtype, kv_dtype, longest, outputs);
    }
  }
  return outputs;
}

}  // namespace medusa::sanitize
