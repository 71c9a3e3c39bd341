"""rotary_append: rotary embedding of a step's queries and keys, and the append of its keys and values to the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check
from ._backends import Native, resolve
from ._library import custom_op, traced
from .native.rotary_append import arguments
from .reference import rotary_append as reference

BACKENDS = {
    "reference": reference.launch,
    "cpu": Native("cpu", "rotary_append", arguments),
    "cuda": Native("cuda", "rotary_append", arguments),
}


def rotary_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    depths: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    backend: str = "auto",
) -> None:
    """Rotates q in place and writes node i's rotated k and its v to row cache_seqlens[b] + i of the caches.

    Node i stands at position cache_seqlens[b] + depths[i]. The pairs of a rotation are (j, j + rotary_dim / 2), as
    Llama checkpoints lie (Su et al., 2021). Dimensions from rotary_dim on pass through.

    Args:
        q: (batch, n, num_heads, head_dim) fp32, bf16 or fp16, rotated in place.
        k, v: (batch, n, num_kv_heads, head_dim) of q's dtype; read only.
        cos, sin: float32 (positions, rotary_dim / 2).
        k_cache, v_cache: (batch, max_seqlen, num_kv_heads, head_dim) of one dtype (fp32, bf16 or fp16, which may differ
            from q's), with equal strides; n rows of each sequence are written.
        cache_seqlens: int32 (batch,), 0 to max_seqlen - n.
        depths: int32 (n,) or (batch, n), see `Tree.depths`.
        q_norm, k_norm: (head_dim,) weights, of one dtype, of an RMSNorm over each head before the rotation (Qwen3), or
            None.
        norm_eps: that norm's epsilon; > 0.
        backend: "auto", "reference", "cpu" or "cuda".

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    tensors = (q, k, v, cos, sin, k_cache, v_cache, cache_seqlens, depths, q_norm, k_norm)
    if torch.compiler.is_compiling():
        traced("rotary_append", *tensors, norm_eps, backend)
    else:
        _checked(*tensors, norm_eps, backend)


def _checked(q, k, v, cos, sin, k_cache, v_cache, cache_seqlens, depths, q_norm, k_norm, norm_eps, backend):
    _check.tensor("q", q, shape=(None,) * 4, dtype=_check.FLOATS)
    batch, n, _, head_dim = q.shape
    _check.in_range("q's batch", batch, 1, 2**31 - 1)
    _check.in_range("q's number of nodes", n, 1, _check.MAX_NODES)
    _check.in_range("q's head_dim", head_dim, 1, _check.MAX_HEAD_DIM)
    _check.tensor("k", k, shape=(batch, n, None, head_dim), dtype=q.dtype, device=q.device)
    _check.tensor("v", v, shape=k.shape, dtype=q.dtype, device=q.device)
    _check.tensor("cos", cos, shape=(None, None), dtype=torch.float32, device=q.device)
    _check.tensor("sin", sin, shape=cos.shape, dtype=torch.float32, device=q.device)
    _check.in_range("cos' width (rotary_dim / 2)", cos.shape[1], 1, head_dim // 2)
    _check.tensor("k_cache", k_cache, shape=(batch, None, k.shape[2], head_dim), dtype=_check.FLOATS, device=q.device)
    _check.tensor("v_cache", v_cache, shape=k_cache.shape, dtype=k_cache.dtype, device=q.device)
    for name, value in (("q", q), ("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        _check.dense_rows(name, value)
    for name, value in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _check.writable(name, value)
    _check.one_walk("k_cache", k_cache, "v_cache", v_cache)
    if k_cache.data_ptr() == v_cache.data_ptr() and k_cache.numel():
        raise ValueError("v_cache must have memory of its own, not k_cache's: both are written")
    cache_seqlens = _check.cache_seqlens(cache_seqlens, batch, "k_cache", k_cache.shape[1], n, q.device)
    _check.tensor("depths", depths, dtype=torch.int32, device=q.device)
    if tuple(depths.shape) not in ((n,), (batch, n)):
        raise ValueError(f"depths must have shape ({n},) or ({batch}, {n}), not {tuple(depths.shape)}")
    if _check.values_wanted(q.device):
        _check.all_between("depths", depths, 0, n - 1)
        last = int((cache_seqlens.view(-1, 1) + depths).max())
        _check.in_range("the last position (cache_seqlens + depths)", last, 0, cos.shape[0] - 1)
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            _check.tensor(name, weight, shape=(head_dim,), dtype=_check.FLOATS, device=q.device)
    if (q_norm is None) != (k_norm is None) or (q_norm is not None and q_norm.dtype != k_norm.dtype):
        found = " and ".join("None" if weight is None else str(weight.dtype) for weight in (q_norm, k_norm))
        raise ValueError(f"q_norm and k_norm must be given together, in one dtype, not {found}")
    norm_eps = _check.positive("norm_eps", norm_eps)
    launch = resolve("rotary_append", BACKENDS, backend, q.device)
    cos, sin, depths = cos.contiguous(), sin.contiguous(), depths.contiguous()
    if q_norm is not None:
        q_norm, k_norm = q_norm.contiguous(), k_norm.contiguous()
    launch(q, k, v, cos, sin, k_cache, v_cache, cache_seqlens, depths, q_norm, k_norm, norm_eps)


@custom_op("rotary_append", mutates=("q", "k_cache", "v_cache"))
def _op(
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
    backend: str,
) -> None:
    _checked(q, k, v, cos, sin, k_cache, v_cache, cache_seqlens, depths, q_norm, k_norm, norm_eps, backend)


@_op.register_fake
def _fake(q, k, v, cos, sin, k_cache, v_cache, cache_seqlens, depths, q_norm, k_norm, norm_eps, backend):
    return None
