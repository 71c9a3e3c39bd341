"""tree_attention: rows are n x group queries packed per K/V head. The committed prefix is split over programs; the last
part also takes the tree's own columns, the only ones that the mask words apply to. A second kernel combines the parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Call, Target, block, launcher

_LOG2E = 1.4426950408889634
_KEYS = 64  # of one tile at most: a mask word
_MAX_SPLITS = 64
_COMBINED = 16  # parts that the combining kernel holds at once


@triton.jit
def attend(q, k, v, visible, scale, values, top, mass, DOT: tl.constexpr):
    """One tile of keys folded into the running softmax. q (rows, dim), k (dim, keys), v (keys, dim)."""
    scores = tl.dot(q, k, input_precision="ieee") * scale
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing visible so far
    weights = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(top - shift)
    values = values * fade[:, None] + tl.dot(weights.to(DOT), v, input_precision="ieee")
    return values, new_top, mass * fade + tl.sum(weights, 1)


@triton.jit
def tree_attention_kernel(
    q,  # (batch, n, heads, head_dim)
    k_cache,  # (batch, max_seqlen, kv_heads, head_dim)
    v_cache,
    cache_seqlens,  # (batch,)
    tree_mask,  # (n, words) or (batch, n, words)
    out,  # (batch, n, heads, head_dim), dense
    part_values,  # (splits, batch * kv_heads * n * group, head_dim); None: one part, written to `out`
    part_stats,  # (splits, batch * kv_heads * n * group, 2): largest score, sum of weights
    q_batch_stride,
    q_row_stride,
    q_head_stride,
    kv_batch_stride,
    kv_row_stride,
    kv_head_stride,
    mask_batch_stride,
    batch,
    n,
    kv_heads,
    words,
    splits,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    DOT: tl.constexpr,
):
    program = tl.program_id(0)
    rows = n * GROUP
    row_tiles = tl.cdiv(rows, ROWS)
    # Row tiles of one K/V head stand side by side: the second finds the keys in L2.
    row = program % row_tiles * ROWS + tl.arange(0, ROWS)
    split = program // row_tiles % splits
    b_kv = program // row_tiles // splits
    b, kv_head = b_kv // kv_heads, b_kv % kv_heads
    node, head = row // GROUP, kv_head * GROUP + row % GROUP
    real = row < rows
    dim = tl.arange(0, DIM)
    inside = dim < HEAD_DIM

    q_at = b.to(tl.int64) * q_batch_stride + node.to(tl.int64) * q_row_stride + head.to(tl.int64) * q_head_stride
    queries = tl.load(q + q_at[:, None] + dim[None, :], mask=real[:, None] & inside[None, :], other=0.0).to(DOT)
    first_key = b.to(tl.int64) * kv_batch_stride + kv_head.to(tl.int64) * kv_head_stride
    row_stride = tl.full([], 1, tl.int64) * kv_row_stride  # `kv_row_stride` may be a constant
    key = tl.arange(0, KEYS)
    values = tl.zeros([ROWS, DIM], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)

    prefix = tl.load(cache_seqlens + b)
    length = tl.cdiv(tl.cdiv(prefix, splits), KEYS) * KEYS
    end = tl.minimum((split + 1) * length, prefix)
    for start in range(split * length, end, KEYS):
        row_at = first_key + start * row_stride
        k_at = k_cache + row_at + key[None, :] * kv_row_stride + dim[:, None]
        v_at = v_cache + row_at + key[:, None] * kv_row_stride + dim[None, :]
        here = start + key < end
        k = tl.load(k_at, mask=here[None, :] & inside[:, None], other=0.0).to(DOT)
        v = tl.load(v_at, mask=here[:, None] & inside[None, :], other=0.0).to(DOT)
        values, top, mass = attend(queries, k, v, here[None, :], scale, values, top, mass, DOT)

    if split == splits - 1:
        word_at = tree_mask + b.to(tl.int64) * mask_batch_stride + node * words
        for start in range(0, n, KEYS):
            row_at = first_key + (prefix + start) * row_stride
            k_at = k_cache + row_at + key[None, :] * kv_row_stride + dim[:, None]
            v_at = v_cache + row_at + key[:, None] * kv_row_stride + dim[None, :]
            here = start + key < n
            k = tl.load(k_at, mask=here[None, :] & inside[:, None], other=0.0).to(DOT)
            v = tl.load(v_at, mask=here[:, None] & inside[None, :], other=0.0).to(DOT)
            word = tl.load(word_at + start // 64, mask=real, other=0)
            bits = (word[:, None] >> (start % 64 + key)[None, :].to(tl.int64)) & 1
            visible = (bits != 0) & here[None, :]
            values, top, mass = attend(queries, k, v, visible, scale, values, top, mass, DOT)

    stored = real[:, None] & inside[None, :]
    if part_values is None:
        out_at = ((b.to(tl.int64) * n + node) * kv_heads * GROUP + head) * HEAD_DIM
        values = values / mass[:, None]
        tl.store(out + out_at[:, None] + dim[None, :], values.to(out.dtype.element_ty), mask=stored)
    else:
        part = (split.to(tl.int64) * batch * kv_heads + b_kv) * rows + row
        tl.store(part_values + part[:, None] * HEAD_DIM + dim[None, :], values, mask=stored)
        tl.store(part_stats + part * 2, top, mask=real)
        tl.store(part_stats + part * 2 + 1, mass, mask=real)


@triton.jit
def combine_kernel(
    part_values,
    part_stats,
    out,
    all_rows,
    n,
    kv_heads,
    splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, DIM)
    every = tl.arange(0, SPLITS)
    tops = tl.load(part_stats + (every * all_rows + row) * 2, mask=every < splits, other=float("-inf"))
    top = tl.max(tops, 0)
    values = tl.zeros([DIM], tl.float32)
    mass = 0.0
    for first in range(0, splits, PARTS):
        part = first + tl.arange(0, PARTS)
        at = part * all_rows + row
        stats = part_stats + at * 2
        weight = tl.exp2(tl.load(stats, mask=part < splits, other=float("-inf")) - top)
        mass += tl.sum(weight * tl.load(stats + 1, mask=part < splits, other=0.0), 0)
        held = (part < splits)[:, None] & (dim < HEAD_DIM)[None, :]
        parts = tl.load(part_values + at[:, None] * HEAD_DIM + dim[None, :], mask=held, other=0.0)
        values += tl.sum(weight[:, None] * parts, 0)
    b_kv, packed = row // (n * GROUP), row % (n * GROUP)
    b, head = b_kv // kv_heads, b_kv % kv_heads * GROUP + packed % GROUP
    out_at = ((b * n + packed // GROUP) * kv_heads * GROUP + head) * HEAD_DIM
    tl.store(out + out_at + dim, (values / mass).to(out.dtype.element_ty), mask=dim < HEAD_DIM)


def calls(
    target: Target,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    tree_mask: Tensor,
    scale: float,
    out: Tensor,
) -> list[Call]:
    batch, n, heads, head_dim = q.shape
    kv_heads = k_cache.shape[2]
    group = heads // kv_heads
    dot = target.dot_dtype(q, k_cache)
    wide = target.wide(dot)
    dim = block(head_dim, 16, 256)
    rows = block(n * group, 16, 16 if not wide else 128 if dim <= 128 else 64)
    tiles = batch * kv_heads * triton.cdiv(n * group, rows)
    # As many parts as fill the chip twice, of at least a tile of the longest prefix there may be.
    splits = min(2 * target.processors // tiles, triton.cdiv(k_cache.shape[1] - n, _KEYS), _MAX_SPLITS)
    splits = max(splits, 1)
    all_rows = batch * heads * n
    part_values = part_stats = None
    if splits > 1:
        part_values = torch.empty(splits, all_rows, head_dim, dtype=torch.float32, device=q.device)
        part_stats = torch.empty(splits, all_rows, 2, dtype=torch.float32, device=q.device)
    shape = {"GROUP": group, "HEAD_DIM": head_dim, "DIM": dim}
    attention = Call(
        tree_attention_kernel,
        tiles * splits,
        (
            *(q, k_cache, v_cache, cache_seqlens, tree_mask, out, part_values, part_stats),
            *(*q.stride()[:3], *k_cache.stride()[:3], tree_mask.stride(0) if tree_mask.dim() == 3 else 0),
            *(batch, n, kv_heads, tree_mask.shape[-1], splits, scale * _LOG2E),
        ),
        {**shape, "ROWS": rows, "KEYS": 32 if not wide or dim > 128 else _KEYS, "DOT": dot},
        warps=8 if rows == 128 or dim > 128 else 4,
        stages=target.stages(2 if dim > 128 else 3),
    )
    if splits == 1:
        return [attention]
    constants = {**shape, "SPLITS": block(splits, 1, _MAX_SPLITS), "PARTS": block(splits, 1, _COMBINED)}
    arguments = (part_values, part_stats, out, all_rows, n, kv_heads, splits)
    return [attention, Call(combine_kernel, all_rows, arguments, constants)]


launch = launcher(calls)
