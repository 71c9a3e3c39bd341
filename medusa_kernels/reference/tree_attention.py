"""Attention of tree nodes over a committed prefix and their own ancestors, softmax in fp32."""

import torch
from torch import Tensor


@torch.no_grad()
def launch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, tree_mask: Tensor, scale: float, out: Tensor
) -> None:
    batch, n, heads, _ = q.shape
    group = heads // k_cache.shape[2]
    for b in range(batch):
        prefix = int(cache_seqlens[b])
        # Rows past prefix + n may hold NaN: they are cut off before any arithmetic.
        keys = k_cache[b, : prefix + n].float().repeat_interleave(group, dim=1)
        values = v_cache[b, : prefix + n].float().repeat_interleave(group, dim=1)
        visible = torch.ones(n, prefix + n, dtype=torch.bool, device=q.device)
        visible[:, prefix:] = unpack_mask(tree_mask if tree_mask.dim() == 2 else tree_mask[b], n)
        scores = torch.einsum("ihd,jhd->hij", q[b].float(), keys) * scale
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        out[b] = torch.einsum("hij,jhd->ihd", weights, values).to(out.dtype)


def unpack_mask(words: Tensor, n: int) -> Tensor:
    """Mask words (n, words) int64 -> bool (n, n): entry [i, j] is bit j of row i."""
    node = torch.arange(n, device=words.device)
    return ((words[:, node // 64] >> (node % 64)) & 1).bool()
