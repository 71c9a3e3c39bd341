"""A prompt into one sequence's cache, in causal chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from medusa_kernels import Tree

from .kv_cache import KVCache
from .model import Forward, Model

# Rows of one prefill pass: the same with and without guesses, so that both start from the same cache.
PREFILL_CHUNK = 64


def chain_layout(nodes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """depths (nodes,) and mask words (nodes, words) of a plain causal block."""
    chain = Tree.named(f"chain-{nodes - 1}") if nodes > 1 else Tree.from_choices([])
    return chain.depths.to(device), chain.mask_words.to(device)


def prefill(model: Model, cache: KVCache, prompt: list[int]) -> Tensor:
    """Fills `cache`, one sequence's, from row 0 and sets its length to the prompt's.

    Returns:
        (1, hidden_size), the row after the final norm that the token after the prompt is chosen from.
    """
    cache.seqlens.zero_()
    tokens = torch.tensor([prompt], dtype=torch.int32, device=model.device)
    forward = None
    for start in range(0, len(prompt), PREFILL_CHUNK):
        chunk = tokens[:, start : start + PREFILL_CHUNK]
        n = chunk.shape[1]
        if forward is None or forward.tokens.shape != chunk.shape:
            forward = Forward(model, cache, n, *chain_layout(n, model.device), prompt_length=len(prompt))
        forward.tokens.copy_(chunk)
        forward.run()
        cache.seqlens.add_(n)
    return forward.hidden[-1:]
