"""tree_attention: every tree node attends to the committed prefix and to its own ancestors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import _check
from ._backends import Lazy, Native, resolve
from ._library import custom_op, traced
from .native import with_workspace
from .native.tree_attention import arguments
from .reference import tree_attention as reference

BACKENDS = {
    "reference": reference.launch,
    "cpu": Native("cpu", "tree_attention", arguments),
    "cuda": Native("cuda", "tree_attention", with_workspace("tree_attention", arguments)),
    "triton": Lazy("medusa_kernels.triton.tree_attention"),
}
# Those that give a node, bit for bit, what plain decoding gives it.
_row_invariant_arguments = functools.partial(arguments, row_invariant=True)
ROW_INVARIANT = {
    "cpu": BACKENDS["cpu"],
    "cuda": Native("cuda", "tree_attention", with_workspace("tree_attention", _row_invariant_arguments)),
}


def resolve_row_invariant(backend: str, device: torch.device) -> Callable[..., None]:
    """The launch of `ROW_INVARIANT`. Raises ValueError where there is none."""
    chosen = device.type if backend == "auto" else backend
    return resolve("row-invariant tree_attention", ROW_INVARIANT, chosen, device)


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    tree_mask: Tensor,
    *,
    scale: float | None = None,
    row_invariant: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Attention of `n` tree nodes over a K/V cache that already holds the nodes' own rows.

    Node i of sequence b sees rows [0, cache_seqlens[b]) and those rows cache_seqlens[b] + j whose bit j is set in row
    i of the mask. n = 1 is plain decoding; a chain's mask is a causal block. Heads are grouped onto K/V heads in order
    (GQA).

    Args:
        q: (batch, n, num_heads, head_dim) fp32, bf16 or fp16; n and head_dim up to 256.
        k_cache, v_cache: (batch, max_seqlen, num_kv_heads, head_dim) of one dtype, with equal strides. Rows from
            cache_seqlens[b] + n on are never read and may hold NaN. The CPU also takes bf16 caches under an fp32 q.
        cache_seqlens: int32 (batch,), committed rows of each sequence, 0 to max_seqlen - n.
        tree_mask: int64 (n, words) or (batch, n, words), words = ceil(n / 64): see `Tree.mask_words`.
        scale: factor of q·k; None is 1 / sqrt(head_dim).
        row_invariant: a node's bits are those of n = 1 after the same tokens, whatever stands beside it. So it always
            is on the CPU and, in CUDA, with fp32; bf16 and fp16 then leave the tensor cores, which is slower. The
            other backends cannot.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        (batch, n, num_heads, head_dim) in q's dtype. Nothing else is written.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    if torch.compiler.is_compiling():
        arguments = (q, k_cache, v_cache, cache_seqlens, tree_mask, scale, row_invariant, backend)
        return traced("tree_attention", *arguments)
    return _checked(q, k_cache, v_cache, cache_seqlens, tree_mask, scale, row_invariant, backend)


def _checked(q, k_cache, v_cache, cache_seqlens, tree_mask, scale, row_invariant, backend):
    _check.tensor("q", q, shape=(None,) * 4, dtype=_check.FLOATS)
    batch, n, heads, head_dim = q.shape
    _check.in_range("q's batch", batch, 1, 2**31 - 1)
    _check.in_range("q's number of nodes", n, 1, _check.MAX_NODES)
    _check.in_range("q's head_dim", head_dim, 1, _check.MAX_HEAD_DIM)
    _check.tensor("k_cache", k_cache, shape=(batch, None, None, head_dim), dtype=_check.FLOATS, device=q.device)
    _check.tensor("v_cache", v_cache, shape=k_cache.shape, dtype=k_cache.dtype, device=q.device)
    kv_heads = k_cache.shape[2]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"q's number of heads must be a multiple of k_cache's, not {heads} against {kv_heads}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _check.dense_rows(name, cache)
    _check.one_walk("k_cache", k_cache, "v_cache", v_cache)
    cache_seqlens = _check.cache_seqlens(cache_seqlens, batch, "k_cache", k_cache.shape[1], n, q.device)
    tree_mask = _check.tree_mask(tree_mask, batch, n, q.device)
    if q.stride(-1) != 1:
        q = q.contiguous()
    scale = head_dim**-0.5 if scale is None else _check.number("scale", scale)
    if row_invariant:
        launch = resolve_row_invariant(backend, q.device)
    else:
        launch = resolve("tree_attention", BACKENDS, backend, q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(q, k_cache, v_cache, cache_seqlens, tree_mask, scale, out)
    return out


@custom_op("tree_attention")
def _op(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    tree_mask: Tensor,
    scale: float | None,
    row_invariant: bool,
    backend: str,
) -> Tensor:
    return _checked(q, k_cache, v_cache, cache_seqlens, tree_mask, scale, row_invariant, backend)


@_op.register_fake
def _fake(q, k_cache, v_cache, cache_seqlens, tree_mask, scale, row_invariant, backend):
    return q.new_empty(q.shape)
