"""Medusa heads (Cai et al., 2024, section 2.1): residual SiLU blocks on one hidden row, an LM head, and its top-k."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def launch(
    hidden: Tensor,
    block_weight: Tensor,
    block_bias: Tensor | None,
    lm_head_weight: Tensor,
    token_map: Tensor | None,
    top_k: int,
    draft_tokens: Tensor,
    logprobs: Tensor,
) -> None:
    heads, layers = block_weight.shape[:2]
    for head in range(heads):
        x = hidden.float()
        for layer in range(layers):
            y = x @ block_weight[head, layer].float().T
            if block_bias is not None:
                y = y + block_bias[head, layer].float()
            x = x + F.silu(y)
        own = lm_head_weight if lm_head_weight.dim() == 2 else lm_head_weight[head]
        logits = x @ own.float().T
        # By the logits, of which distinct ones may share a log-probability; a stable sort keeps equal ones in the order
        # of their draft ids.
        tokens = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k]
        draft_tokens[:, head] = tokens.int() if token_map is None else token_map[tokens]
        logprobs[:, head] = logits.log_softmax(dim=-1).gather(1, tokens)
