"""A text into one sequence's cache, in causal chunks."""

from __future__ import annotations

from collections.abc import Iterator

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
    *_, hidden = hidden_rows(model, cache, torch.tensor(prompt, dtype=torch.int32, device=model.device))
    return hidden[-1:]


def hidden_rows(model: Model, cache: KVCache, tokens: Tensor) -> Iterator[Tensor]:
    """Reads int32 `tokens` (length,), a prompt, into `cache`, one sequence's, from row 0.

    Yields:
        (n, hidden_size), the rows of each chunk of n <= PREFILL_CHUNK tokens after the final norm; valid until the
        next.
    """
    cache.seqlens.zero_()
    forward = None
    for chunk in tokens.split(PREFILL_CHUNK):
        n = len(chunk)
        if forward is None or forward.tokens.shape[1] != n:
            forward = Forward(model, cache, n, *chain_layout(n, model.device), prompt_length=len(tokens))
        forward.tokens.copy_(chunk)
        forward.run()
        cache.seqlens.add_(n)
        yield forward.hidden
