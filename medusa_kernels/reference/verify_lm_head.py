"""The LM head's logits, in the hidden rows' dtype as `linear` gives them, and their verification."""

import torch
from torch import Tensor

from . import linear, verify_tree


@torch.no_grad()
def launch(
    hidden: Tensor,
    lm_head_weight: Tensor,
    tree_tokens: Tensor,
    parents: Tensor,
    acceptance: tuple[Tensor, ...] | None,
    accepted_nodes: Tensor,
    accept_length: Tensor,
    next_token: Tensor,
) -> None:
    batch, n, _ = hidden.shape
    logits = hidden.new_empty(batch, n, lm_head_weight.shape[0])
    linear.launch(hidden.flatten(0, 1), lm_head_weight, None, None, logits.view(batch * n, -1))
    verify_tree.launch(logits, tree_tokens, parents, acceptance, accepted_nodes, accept_length, next_token)
