from torch import Tensor

from . import DTYPE, address


def arguments(
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
) -> tuple:
    batch, n, heads, head_dim = q.shape
    return (
        *map(address, (q, k, v, cos, sin, k_cache, v_cache, cache_seqlens, depths, q_norm, k_norm)),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *k_cache.stride()[:3],
        depths.stride(0) if depths.dim() == 2 else 0,
        *(batch, n, heads, k.shape[2], head_dim, 2 * cos.shape[1]),
        norm_eps,
        DTYPE[q.dtype],
        DTYPE[k_cache.dtype],
        0 if q_norm is None else DTYPE[q_norm.dtype],
    )
