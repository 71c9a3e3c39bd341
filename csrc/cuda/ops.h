// The CUDA backend's launchers. Each enqueues on `stream` and returns a cudaError_t; none synchronises or allocates.
#pragma once
#include <cstdint>
#include <string>

#include "params.h"

namespace medusa::cuda {

// 0 and a reason when there is no usable device (no driver, no GPU): never throws.
int device_count(std::string* reason);
const char* error_string(int error);

// Memory that some ops need between their blocks. `scratch` may hold anything; `counters` are 0 before a launch and 0
// again after it. Neither may be in use by another stream at the same time.
struct Workspace {
  void* scratch;
  uint32_t* counters;
};
struct WorkspaceSize {
  int64_t scratch_bytes, counters;
};

WorkspaceSize tree_attention_workspace(const TreeAttentionParams&);
int tree_attention(const TreeAttentionParams&, Workspace, uintptr_t stream);
WorkspaceSize draft_heads_workspace(const DraftHeadsParams&);
int draft_heads(const DraftHeadsParams&, Workspace, uintptr_t stream);
WorkspaceSize verify_tree_workspace(const VerifyTreeParams&);
int verify_tree(const VerifyTreeParams&, Workspace, uintptr_t stream);
WorkspaceSize verify_lm_head_workspace(const VerifyLmHeadParams&);
int verify_lm_head(const VerifyLmHeadParams&, Workspace, uintptr_t stream);
int rotary_append(const RotaryAppendParams&, uintptr_t stream);
int rms_norm(const RmsNormParams&, uintptr_t stream);
int silu_mul(const SiluMulParams&, uintptr_t stream);
int linear(const LinearParams&, uintptr_t stream);
int compact_kv(const CompactKvParams&, uintptr_t stream);

}  // namespace medusa::cuda
