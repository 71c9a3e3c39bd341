"""Moves the accepted path's K/V rows down so that they follow the committed prefix."""

import torch
from torch import Tensor


@torch.no_grad()
def launch(kv_cache: Tensor, accepted_nodes: Tensor, accept_length: Tensor, cache_seqlens: Tensor) -> None:
    for b in range(kv_cache.shape[2]):
        start, length = int(cache_seqlens[b]), int(accept_length[b])
        sources = start + accepted_nodes[b, : length + 1].long()
        kv_cache[:, :, b, start : start + length + 1] = kv_cache[:, :, b, sources]
