from torch import Tensor

from . import DTYPE, address


def arguments(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    tree_mask: Tensor,
    scale: float,
    out: Tensor,
    *,
    row_invariant: bool = False,
) -> tuple:
    batch, n, heads, head_dim = q.shape
    return (
        *map(address, (q, k_cache, v_cache, cache_seqlens, tree_mask, out)),
        *q.stride()[:3],
        *k_cache.stride()[:3],
        tree_mask.stride(0) if tree_mask.dim() == 3 else 0,
        *(batch, n, heads, k_cache.shape[2], head_dim, tree_mask.shape[-1], k_cache.shape[1]),
        scale,
        DTYPE[q.dtype],
        DTYPE[k_cache.dtype],
        row_invariant,
    )
