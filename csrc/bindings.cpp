// m.def lines only: addresses and sizes in, launcher called. The argument order is that of
// medusa_kernels/native/<op>.py.
#include <pybind11/pybind11.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "params.h"
#ifndef MEDUSA_EMULATE  // tests/emulation compiles the CUDA bindings alone
#include "cpu/ops.h"
#endif
#ifdef MEDUSA_WITH_CUDA
#include "cuda/ops.h"
#endif

namespace py = pybind11;

namespace medusa {
namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

TreeAttentionParams tree_attention(Address q, Address k_cache, Address v_cache, Address cache_seqlens,
                                   Address tree_mask, Address out, int64_t q_batch, int64_t q_row, int64_t q_head,
                                   int64_t kv_batch, int64_t kv_row, int64_t kv_head, int64_t mask_batch, int batch,
                                   int n, int heads, int kv_heads, int head_dim, int words, int max_seqlen, float scale,
                                   int q_dtype, int kv_dtype, bool row_invariant) {
  return {at<void>(q),
          at<void>(k_cache),
          at<void>(v_cache),
          at<int32_t>(cache_seqlens),
          at<uint64_t>(tree_mask),
          at<void>(out),
          q_batch,
          q_row,
          q_head,
          kv_batch,
          kv_row,
          kv_head,
          mask_batch,
          batch,
          n,
          heads,
          kv_heads,
          head_dim,
          words,
          max_seqlen,
          scale,
          DType(q_dtype),
          DType(kv_dtype),
          row_invariant};
}

RotaryAppendParams rotary_append(Address q, Address k, Address v, Address cos, Address sin, Address k_cache,
                                 Address v_cache, Address cache_seqlens, Address depths, Address q_norm, Address k_norm,
                                 int64_t q_batch, int64_t q_row, int64_t q_head, int64_t k_batch, int64_t k_row,
                                 int64_t k_head, int64_t v_batch, int64_t v_row, int64_t v_head, int64_t kv_batch,
                                 int64_t kv_row, int64_t kv_head, int64_t depths_batch, int batch, int n, int heads,
                                 int kv_heads, int head_dim, int rotary_dim, float norm_eps, int dtype, int kv_dtype,
                                 int norm_dtype) {
  return {at<void>(q),
          at<void>(k),
          at<void>(v),
          at<float>(cos),
          at<float>(sin),
          at<void>(k_cache),
          at<void>(v_cache),
          at<int32_t>(cache_seqlens),
          at<int32_t>(depths),
          at<void>(q_norm),
          at<void>(k_norm),
          q_batch,
          q_row,
          q_head,
          k_batch,
          k_row,
          k_head,
          v_batch,
          v_row,
          v_head,
          kv_batch,
          kv_row,
          kv_head,
          depths_batch,
          batch,
          n,
          heads,
          kv_heads,
          head_dim,
          rotary_dim,
          norm_eps,
          DType(dtype),
          DType(kv_dtype),
          DType(norm_dtype)};
}

RmsNormParams rms_norm(Address x, Address residual, Address weight, Address out, int64_t x_row, int64_t residual_row,
                       int rows, int hidden, float eps, int dtype, int weight_dtype) {
  return {at<void>(x), at<void>(residual), at<void>(weight),   at<void>(out), x_row, residual_row, rows, hidden,
          eps,         DType(dtype),       DType(weight_dtype)};
}

SiluMulParams silu_mul(Address gate_up, Address out, int64_t row_stride, int rows, int ffn, int dtype) {
  return {at<void>(gate_up), at<void>(out), row_stride, rows, ffn, DType(dtype)};
}

LinearParams linear(Address x, Address weight, Address bias, Address residual, Address out, int64_t x_row,
                    int64_t residual_row, int64_t out_row, int rows, int in_features, int out_features, int dtype,
                    int bias_dtype, int weight_format) {
  return {at<void>(x),
          at<void>(weight),
          at<void>(bias),
          at<void>(residual),
          at<void>(out),
          x_row,
          residual_row,
          out_row,
          rows,
          in_features,
          out_features,
          DType(dtype),
          DType(bias_dtype),
          WeightFormat(weight_format)};
}

DraftHeadsParams draft_heads(Address hidden, Address block_weight, Address block_bias, Address lm_head_weight,
                             Address token_map, Address draft_tokens, Address logprobs, int64_t hidden_row, int batch,
                             int heads, int layers, int hidden_size, int vocab, int top_k, int own_lm_heads, int dtype,
                             int bias_dtype, int block_format, int lm_head_format) {
  return {at<void>(hidden),
          at<void>(block_weight),
          at<void>(block_bias),
          at<void>(lm_head_weight),
          at<int32_t>(token_map),
          at<int32_t>(draft_tokens),
          at<float>(logprobs),
          hidden_row,
          batch,
          heads,
          layers,
          hidden_size,
          vocab,
          top_k,
          own_lm_heads,
          DType(dtype),
          DType(bias_dtype),
          WeightFormat(block_format),
          WeightFormat(lm_head_format)};
}

VerifyTreeParams verify_tree(Address logits, Address tree_tokens, Address parents, Address mode, Address temperature,
                             Address top_p, Address top_k, Address posterior_threshold, Address posterior_alpha,
                             Address seed, Address offset, Address accepted_nodes, Address accept_length,
                             Address next_token, int64_t logits_batch, int64_t logits_row, int64_t parents_batch,
                             int batch, int n, int vocab, int max_depth, int dtype) {
  return {at<void>(logits),
          at<int32_t>(tree_tokens),
          at<int32_t>(parents),
          at<int32_t>(mode),
          at<float>(temperature),
          at<float>(top_p),
          at<int32_t>(top_k),
          at<float>(posterior_threshold),
          at<float>(posterior_alpha),
          at<int64_t>(seed),
          at<int64_t>(offset),
          at<int32_t>(accepted_nodes),
          at<int32_t>(accept_length),
          at<int32_t>(next_token),
          logits_batch,
          logits_row,
          parents_batch,
          batch,
          n,
          vocab,
          max_depth,
          DType(dtype)};
}

VerifyLmHeadParams verify_lm_head(Address hidden, Address lm_head_weight, Address tree_tokens, Address parents,
                                  Address mode, Address temperature, Address top_p, Address top_k,
                                  Address posterior_threshold, Address posterior_alpha, Address seed, Address offset,
                                  Address accepted_nodes, Address accept_length, Address next_token,
                                  int64_t parents_batch, int batch, int n, int hidden_size, int vocab, int max_depth,
                                  int dtype, int lm_head_format) {
  return {at<void>(hidden), at<void>(lm_head_weight),
          verify_tree(0, tree_tokens, parents, mode, temperature, top_p, top_k, posterior_threshold, posterior_alpha,
                      seed, offset, accepted_nodes, accept_length, next_token, 0, 0, parents_batch, batch, n, vocab,
                      max_depth, dtype),
          hidden_size, WeightFormat(lm_head_format)};
}

CompactKvParams compact_kv(Address kv_cache, Address accepted_nodes, Address accept_length, Address cache_seqlens,
                           int64_t layer, int64_t kv, int64_t batch_stride, int64_t row, int layers, int batch,
                           int width, int row_bytes, int element_size) {
  return {at<void>(kv_cache),
          at<int32_t>(accepted_nodes),
          at<int32_t>(accept_length),
          at<int32_t>(cache_seqlens),
          layer,
          kv,
          batch_stride,
          row,
          layers,
          batch,
          width,
          row_bytes,
          element_size};
}

#ifndef MEDUSA_EMULATE
// Launches that Python listed once, repeated by one call.
using Plan = std::vector<std::function<void()>>;

template <class Params, class... Args>
void def_cpu(py::module_& m, py::class_<Plan>& plan, const char* name, Params (*params)(Args...),
             void (*launch)(const Params&)) {
  m.def(name, [params, launch](Args... args) {
    const Params p = params(args...);
    py::gil_scoped_release release;
    launch(p);
  });
  plan.def(name, [params, launch](Plan& self, Args... args) {
    self.push_back([p = params(args...), launch] { launch(p); });
  });
}
#endif

#ifdef MEDUSA_WITH_CUDA
void check(const char* name, int error) {
  if (error) throw std::runtime_error(std::string(name) + " (CUDA): " + cuda::error_string(error));
}

template <class Params, class... Args>
void def_cuda(py::module_& m, const char* name, Params (*params)(Args...), int (*launch)(const Params&, Address)) {
  m.def(name, [params, launch, name](Args... args, Address stream) { check(name, launch(params(args...), stream)); });
}

// For an op that needs memory between its blocks: <name>_workspace tells how much.
template <class Params, class... Args>
void def_cuda(py::module_& m, const char* name, Params (*params)(Args...),
              int (*launch)(const Params&, cuda::Workspace, Address), cuda::WorkspaceSize (*size)(const Params&)) {
  m.def(name, [params, launch, name](Args... args, Address scratch, Address counters, Address stream) {
    check(name, launch(params(args...), {at<void>(scratch), at<uint32_t>(counters)}, stream));
  });
  m.def((std::string(name) + "_workspace").c_str(), [params, size](Args... args) {
    const cuda::WorkspaceSize s = size(params(args...));
    return py::make_tuple(s.scratch_bytes, s.counters);
  });
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
#ifndef MEDUSA_EMULATE
  py::module_ c = m.def_submodule("cpu");
  py::class_<Plan> plan(c, "Plan");
  plan.def(py::init<>());
  plan.def("__call__", [](const Plan& self) {
    py::gil_scoped_release release;
    for (const auto& launch : self) launch();
  });
  def_cpu(c, plan, "tree_attention", tree_attention, cpu::tree_attention);
  def_cpu(c, plan, "rotary_append", rotary_append, cpu::rotary_append);
  def_cpu(c, plan, "rms_norm", rms_norm, cpu::rms_norm);
  def_cpu(c, plan, "silu_mul", silu_mul, cpu::silu_mul);
  def_cpu(c, plan, "linear", linear, cpu::linear);
  def_cpu(c, plan, "draft_heads", draft_heads, cpu::draft_heads);
  def_cpu(c, plan, "verify_tree", verify_tree, cpu::verify_tree);
  def_cpu(c, plan, "verify_lm_head", verify_lm_head, cpu::verify_lm_head);
  def_cpu(c, plan, "compact_kv", compact_kv, cpu::compact_kv);
  c.def("packed_bytes", [](int matrices, int out_features, int in_features, int format) {
    return cpu::packed_bytes(matrices, out_features, in_features, WeightFormat(format));
  });
  c.def(
      "pack",
      [](Address weight, Address packed, int matrices, int out_features, int in_features, int dtype, int format) {
        cpu::pack(at<void>(weight), at<void>(packed), matrices, out_features, in_features, DType(dtype),
                  WeightFormat(format));
      },
      py::call_guard<py::gil_scoped_release>());
  c.def("isa", [] { return std::string(cpu::isa()); });
  c.def("force_isa", [](const std::string& name) { cpu::force_isa(name.c_str()); });
  c.def("num_threads", cpu::num_threads);
  c.def("set_num_threads", cpu::set_num_threads);

#endif
  m.attr("max_nodes") = kMaxNodes;
  m.attr("max_head_dim") = kMaxHeadDim;
#ifdef MEDUSA_WITH_CUDA
  m.attr("built_with_cuda") = true;
  m.def("cuda_device_count", [] {
    std::string reason;
    const int count = cuda::device_count(&reason);
    return py::make_tuple(count, reason);
  });
  py::module_ g = m.def_submodule("cuda");
  def_cuda(g, "tree_attention", tree_attention, cuda::tree_attention, cuda::tree_attention_workspace);
  def_cuda(g, "rotary_append", rotary_append, cuda::rotary_append);
  def_cuda(g, "rms_norm", rms_norm, cuda::rms_norm);
  def_cuda(g, "silu_mul", silu_mul, cuda::silu_mul);
  def_cuda(g, "linear", linear, cuda::linear);
  def_cuda(g, "draft_heads", draft_heads, cuda::draft_heads, cuda::draft_heads_workspace);
  def_cuda(g, "verify_tree", verify_tree, cuda::verify_tree, cuda::verify_tree_workspace);
  def_cuda(g, "verify_lm_head", verify_lm_head, cuda::verify_lm_head, cuda::verify_lm_head_workspace);
  def_cuda(g, "compact_kv", compact_kv, cuda::compact_kv);
#else
  m.attr("built_with_cuda") = false;
  m.def("cuda_device_count", [] { return py::make_tuple(0, "built without CUDA"); });
#endif
}

}  // namespace medusa
