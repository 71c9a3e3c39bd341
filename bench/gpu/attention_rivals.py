"""Tree attention as others would do it: each a call on the op's own tensors, prepared outside the clock."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from medusa_kernels.reference.tree_attention import unpack_mask

Rival = Callable[[], Tensor]  # (batch, n, heads, head_dim); heads may be (kv_heads, group)


def sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, mask: Tensor, scale: float) -> Rival:
    """PyTorch's fused attention with a dense mask. A K/V head's queries are stacked as rows, as our kernel does: K/V
    are then read once, which `enable_gqa` with a mask would not do."""
    batch, n, heads, dim = q.shape
    kv_heads, group, keys = k.shape[2], heads // k.shape[2], _keys(q, lengths)
    rows = q.view(batch, n, kv_heads, group, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * n, dim)
    k, v = (t[:, :keys].transpose(1, 2) for t in (k, v))
    # Added, not boolean, and its rows aligned: what the fused kernels take without a copy.
    bias = torch.zeros(group * n, -(-keys // 16) * 16, dtype=q.dtype, device=q.device)
    bias[:, keys - n : keys].masked_fill_(~unpack_mask(mask, n).repeat(group, 1), -torch.inf)
    bias = bias[:, :keys].expand(batch, kv_heads, -1, -1)

    def call() -> Tensor:
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=bias, scale=scale)
        return out.view(batch, kv_heads, group, n, dim).permute(0, 3, 1, 2, 4)

    return call


def flex(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, mask: Tensor, scale: float, *, compiled=True) -> Rival:
    """FlexAttention with the tree as its mask_mod."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n, keys = q.shape[1], _keys(q, lengths)
    prefix, visible = keys - n, unpack_mask(mask, n)

    def tree(_batch, _head, query, key):
        return (key < prefix) | visible[query, (key - prefix).clamp(0, n - 1)]

    q = q.transpose(1, 2).contiguous()
    k, v = (t[:, :keys].transpose(1, 2) for t in (k, v))
    blocks = create_block_mask(tree, None, None, n, keys, device=q.device)
    if compiled:
        torch._dynamo.reset()  # past eight shapes it would fall back to the unfused function, without a word
    attention = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def call() -> Tensor:
        out = attention(q, k, v, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return call


def flashinfer(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, mask: Tensor, scale: float) -> Rival:
    """FlashInfer's ragged prefill with a custom mask."""
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

    batch, n, heads, dim = q.shape
    keys = _keys(q, lengths)
    visible = torch.ones(n, keys, dtype=torch.bool, device=q.device)
    visible[:, keys - n :] = unpack_mask(mask, n)
    k, v = (t[:, :keys].reshape(batch * keys, -1, dim) for t in (k, v))
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(torch.empty(128 << 20, dtype=torch.uint8, device=q.device), "NHD")
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    wrapper.plan(
        starts * n,
        starts * keys,
        heads,
        k.shape[1],
        dim,
        custom_mask=visible.flatten().repeat(batch),
        sm_scale=scale,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    flat = q.view(batch * n, heads, dim)
    return lambda: wrapper.run(flat, k, v).view(batch, n, heads, dim)


def has_flashinfer() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def _keys(q: Tensor, lengths: Tensor) -> int:
    """Prefix and tree: the cases' sequences are all of one length, which rivals with a dense mask need."""
    return int(lengths[0]) + q.shape[1]
