"""Rotary embedding of q and k, and the append of k and v to the cache, with optional per-head RMSNorm before the
rotation.
"""

import torch
from torch import Tensor

from .rms_norm import normalise


@torch.no_grad()
def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    depths: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
) -> None:
    batch, n = q.shape[:2]
    for b in range(batch):
        start = int(cache_seqlens[b])
        positions = start + (depths if depths.dim() == 1 else depths[b]).long()
        q[b] = _rotate(_normalised(q[b], q_norm, norm_eps), cos[positions], sin[positions]).to(q.dtype)
        k_cache[b, start : start + n] = _rotate(_normalised(k[b], k_norm, norm_eps), cos[positions], sin[positions]).to(
            k_cache.dtype
        )
        v_cache[b, start : start + n] = v[b].to(v_cache.dtype)


def _normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x.float() if weight is None else normalise(x.float(), weight, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (n, heads, head_dim), cos and sin (n, rotary_dim / 2): pairs are (i, i + rotary_dim / 2), as in Llama
    checkpoints.
    """
    half = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
