"""compact_kv: the accepted path's K/V rows move down behind the committed prefix, all layers at once."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check
from ._backends import Lazy, Native, resolve
from ._library import custom_op, traced
from .native.compact_kv import arguments
from .reference import compact_kv as reference

BACKENDS = {
    "reference": reference.launch,
    "cpu": Native("cpu", "compact_kv", arguments),
    "cuda": Native("cuda", "compact_kv", arguments),
    "triton": Lazy("medusa_kernels.triton.compact_kv"),
}


def compact_kv(
    kv_cache: Tensor, accepted_nodes: Tensor, accept_length: Tensor, cache_seqlens: Tensor, *, backend: str = "auto"
) -> None:
    """Moves row cache_seqlens[b] + accepted_nodes[b, i] to row cache_seqlens[b] + i, for i rising to accept_length[b].

    Args:
        kv_cache: (layers, 2, batch, max_seqlen, num_kv_heads, head_dim), changed in place. Rows past the new length,
            cache_seqlens[b] + accept_length[b] + 1, are unspecified afterwards.
        accepted_nodes: int32 (batch, width), a path of rising node ids, root first, -1 padded.
        accept_length: int32 (batch,), nodes beyond the root, 0 to width - 1.
        cache_seqlens: int32 (batch,), committed rows before the step; not changed.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    if torch.compiler.is_compiling():
        traced("compact_kv", kv_cache, accepted_nodes, accept_length, cache_seqlens, backend)
    else:
        _checked(kv_cache, accepted_nodes, accept_length, cache_seqlens, backend)


def _checked(kv_cache, accepted_nodes, accept_length, cache_seqlens, backend):
    _check.tensor("kv_cache", kv_cache, shape=(None, 2, None, None, None, None), dtype=_check.FLOATS)
    _check.dense_rows("kv_cache", _check.writable("kv_cache", kv_cache), inner=2)
    batch, max_seqlen = kv_cache.shape[2:4]
    device = kv_cache.device
    _check.in_range("kv_cache's batch", batch, 1, 2**31 - 1)
    _check.tensor("accepted_nodes", accepted_nodes, shape=(batch, None), dtype=torch.int32, device=device)
    _check.tensor("accept_length", accept_length, shape=(batch,), dtype=torch.int32, device=device)
    width = accepted_nodes.shape[1]
    _check.in_range("accepted_nodes' width", width, 1, _check.MAX_NODES)
    cache_seqlens = _check.cache_seqlens(cache_seqlens, batch, "kv_cache", max_seqlen, 1, device)
    if _check.values_wanted(device):
        _check.all_between("accept_length", accept_length, 0, width - 1)
        _check.all_between("accepted_nodes", accepted_nodes, -1, _check.MAX_NODES - 1)
        used = torch.arange(width, device=device) <= accept_length[:, None]
        wrong = used & (accepted_nodes < 0)
        wrong[:, 1:] |= used[:, 1:] & (accepted_nodes[:, 1:] <= accepted_nodes[:, :-1])
        if bool(wrong.any()):
            row = int(wrong.any(1).nonzero()[0])
            held = accepted_nodes[row, : accept_length[row] + 1].tolist()
            raise ValueError(
                f"accepted_nodes must hold rising node ids up to accept_length in every row; row {row} holds {held}"
            )
        last = int((cache_seqlens[:, None] + accepted_nodes)[used].max())
        if last >= max_seqlen:
            raise ValueError(
                f"accepted_nodes must stay inside the cache: cache_seqlens + node is {last}, max_seqlen {max_seqlen}"
            )
    launch = resolve("compact_kv", BACKENDS, backend, device)
    launch(kv_cache, accepted_nodes.contiguous(), accept_length.contiguous(), cache_seqlens)


@custom_op("compact_kv", mutates=("kv_cache",))
def _op(kv_cache: Tensor, accepted_nodes: Tensor, accept_length: Tensor, cache_seqlens: Tensor, backend: str) -> None:
    _checked(kv_cache, accepted_nodes, accept_length, cache_seqlens, backend)


@_op.register_fake
def _fake(kv_cache, accepted_nodes, accept_length, cache_seqlens, backend):
    return None
