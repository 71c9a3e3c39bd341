"""draft_heads: a launch per residual block, all heads together, then one for the LM heads. A program of the latter
takes a slice of the vocabulary, keeps each row's best candidates and its share of the normaliser, and drops the logits;
a last launch merges the slices. Rows count head by head: head * batch + b.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Call, Target, block, launcher
from .keys import rank_key, rank_token, rank_value

_CANDIDATES = 2048  # that the merging kernel looks at together
_STAGES = 4  # all but one of them hold tiles of the products' factors
_SHARED = 99 << 10  # bytes that one program may have on the smallest GPUs meant (sm_86, sm_89)
_BELOW_ALL: tl.constexpr = tl.constexpr(-(2**63))


@triton.jit
def products(
    x, rows, row_at, weight, features, size, ROWS: tl.constexpr, FEATURES: tl.constexpr, INPUTS: tl.constexpr,
    DOT: tl.constexpr
):  # fmt: skip
    """weight[:features] @ x.T as (FEATURES, ROWS): `weight` is the first feature, x + row_at[r] row r of `rows`."""
    feature = tl.arange(0, FEATURES)
    row = tl.arange(0, ROWS)
    sums = tl.zeros([FEATURES, ROWS], tl.float32)
    for first in range(0, size, INPUTS):
        i = first + tl.arange(0, INPUTS)
        w_mask = (feature < features)[:, None] & (i < size)[None, :]
        w = tl.load(weight + feature[:, None] * size + i[None, :], mask=w_mask, other=0.0).to(DOT)
        x_mask = (i < size)[:, None] & (row < rows)[None, :]
        inputs = tl.load(x + row_at[None, :] + i[:, None], mask=x_mask, other=0.0).to(DOT)
        sums = tl.dot(w, inputs, sums, input_precision="ieee")
    return sums


@triton.jit
def residual_block_kernel(
    x,  # (heads, batch, hidden); head_stride 0: all heads read the same
    block_weight,  # (heads, layers, hidden, hidden)
    block_bias,  # (heads, layers, hidden) or None
    out,  # fp32 (heads, batch, hidden), dense
    head_stride,
    row_stride,
    batch,
    size,
    layers,
    layer,
    feature_tiles,
    row_tiles,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    INPUTS: tl.constexpr,
    DOT: tl.constexpr,
):
    """x + silu(W x + b) of one layer."""
    program = tl.program_id(0)
    first_row = program % row_tiles * ROWS
    first_feature = program // row_tiles % feature_tiles * FEATURES
    head = (program // row_tiles // feature_tiles).to(tl.int64)
    row, feature = first_row + tl.arange(0, ROWS), first_feature + tl.arange(0, FEATURES)
    row_at = head * head_stride + row.to(tl.int64) * row_stride
    matrix = head * layers + layer
    weight = block_weight + (matrix * size + first_feature) * size
    sums = products(
        x, batch - first_row, row_at, weight, size - first_feature, size, ROWS, FEATURES, INPUTS, DOT
    )  # fmt: skip
    if block_bias is not None:
        bias = tl.load(block_bias + matrix * size + feature, mask=feature < size, other=0.0)
        sums += bias.to(tl.float32)[:, None]
    mask = (feature < size)[:, None] & (row < batch)[None, :]
    before = tl.load(x + row_at[None, :] + feature[:, None], mask=mask, other=0.0).to(tl.float32)
    out_at = (head * batch + row)[None, :] * size + feature[:, None]
    tl.store(out + out_at, before + sums / (1.0 + tl.exp(-sums)), mask=mask)


@triton.jit
def lm_head_kernel(
    x,  # (heads, batch, hidden)
    lm_head_weight,  # (matrices, vocab, hidden)
    candidates,  # int64 (heads * batch, slices, kept), in any order: see rank_key
    stats,  # fp32 (heads * batch, slices, 2): largest logit, sum of exp(logit - largest)
    head_stride,
    row_stride,
    batch,
    size,
    vocab,
    matrix_rows,
    row_tiles,
    slices,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    INPUTS: tl.constexpr,
    DOT: tl.constexpr,
):
    program = tl.program_id(0)
    # Row tiles of one slice stand side by side: the second finds the weights in L2.
    first_row = program % row_tiles * ROWS
    slice_id = program // row_tiles % slices
    matrix = (program // row_tiles // slices).to(tl.int64)
    here = first_row + tl.arange(0, ROWS)
    row = matrix * matrix_rows + here
    row_at = row // batch * head_stride + row % batch * row_stride
    first_token = slice_id * FEATURES
    weight = lm_head_weight + (matrix * vocab + first_token) * size
    logits = products(
        x, matrix_rows - first_row, row_at, weight, vocab - first_token, size, ROWS, FEATURES, INPUTS, DOT
    )  # fmt: skip

    token = first_token + tl.arange(0, FEATURES)
    real = (token < vocab)[:, None]
    top = tl.max(tl.where(real, logits, float("-inf")), 0)
    mass = tl.sum(tl.where(real, tl.exp(logits - top[None, :]), 0.0), 0)
    part = row * slices + slice_id
    stored = here < matrix_rows
    tl.store(stats + part * 2, top, mask=stored)
    tl.store(stats + part * 2 + 1, mass, mask=stored)

    key = tl.where(real, rank_key(logits, token[:, None]), _BELOW_ALL)
    if KEPT == FEATURES:
        at = (part * KEPT)[None, :] + tl.arange(0, FEATURES)[:, None]
        tl.store(candidates + at, key, mask=stored[None, :])
    else:
        best = tl.max(key, 0)
        for i in range(KEPT):
            tl.store(candidates + part * KEPT + i, best, mask=stored)
            best = tl.max(tl.where(key < best[None, :], key, _BELOW_ALL), 0)


@triton.jit
def merge_kernel(
    candidates,
    stats,
    token_map,  # int32 (vocab,) or None
    draft_tokens,  # (batch, heads, top_k)
    logprobs,
    batch,
    heads,
    slices,
    count,  # slices * kept
    top_k,
    SLICES: tl.constexpr,
    COUNT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    top = tl.full([SLICES], float("-inf"), tl.float32)
    mass = tl.zeros([SLICES], tl.float32)
    for first in range(0, slices, SLICES):
        i = first + tl.arange(0, SLICES)
        at = stats + (row * slices + i) * 2
        slice_top = tl.load(at, mask=i < slices, other=float("-inf"))
        new_top = tl.maximum(top, slice_top)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        slice_mass = tl.load(at + 1, mask=i < slices, other=0.0)
        mass = mass * tl.exp(top - shift) + slice_mass * tl.exp(slice_top - shift)
        top = new_top
    highest = tl.max(top, 0)
    log_mass = tl.log(tl.sum(mass * tl.exp(top - highest), 0))

    out = (row % batch * heads + row // batch) * top_k
    last = tl.full([], 2**63 - 1, tl.int64)
    for rank in range(top_k):
        best = tl.full([COUNT], _BELOW_ALL, tl.int64)
        for first in range(0, count, COUNT):
            i = first + tl.arange(0, COUNT)
            key = tl.load(candidates + row * count + i, mask=i < count, other=_BELOW_ALL)
            best = tl.maximum(best, tl.where(key < last, key, _BELOW_ALL))
        last = tl.max(best, 0)
        token = rank_token(last)
        tl.store(logprobs + out + rank, (rank_value(last) - highest) - log_mass)
        if token_map is not None:
            tl.store(draft_tokens + out + rank, tl.load(token_map + token))
        else:
            tl.store(draft_tokens + out + rank, token)


def calls(
    target: Target,
    hidden: Tensor,
    block_weight: Tensor,
    block_bias: Tensor | None,
    lm_head_weight: Tensor,
    token_map: Tensor | None,
    top_k: int,
    draft_tokens: Tensor,
    logprobs: Tensor,
) -> list[Call]:
    batch, size = hidden.shape
    heads, layers = block_weight.shape[:2]
    vocab = lm_head_weight.shape[-2]
    steps: list[Call] = []

    def tile(weight: Tensor, rows: int, features: int) -> dict:
        dot = target.dot_dtype(hidden, weight)
        if not target.wide(dot):
            return {"ROWS": 16, "FEATURES": 32, "INPUTS": 32, "DOT": dot}
        rows = block(rows, 16, 64)
        input_bytes = 2 * features + 4 * rows  # behind the first block rows are fp32
        inputs = 128 if (_STAGES - 1) * 128 * input_bytes <= _SHARED else 64
        return {"ROWS": rows, "FEATURES": features, "INPUTS": inputs, "DOT": dot}

    x, strides = hidden, (0, hidden.stride(0))  # of heads and rows
    for layer in range(layers):
        constants = tile(block_weight, batch, 64)
        feature_tiles = triton.cdiv(size, constants["FEATURES"])
        row_tiles = triton.cdiv(batch, constants["ROWS"])
        out = torch.empty(heads, batch, size, dtype=torch.float32, device=hidden.device)
        arguments = (x, block_weight, block_bias, out, *strides, batch, size, layers, layer, feature_tiles, row_tiles)
        grid = heads * feature_tiles * row_tiles
        steps.append(Call(residual_block_kernel, grid, arguments, constants, stages=target.stages(_STAGES)))
        x, strides = out, (batch * size, size)

    matrices = heads if lm_head_weight.dim() == 3 else 1
    matrix_rows = heads * batch // matrices
    constants = tile(lm_head_weight, matrix_rows, 128)
    slices = triton.cdiv(vocab, constants["FEATURES"])
    kept = min(top_k, constants["FEATURES"])
    row_tiles = triton.cdiv(matrix_rows, constants["ROWS"])
    candidates = torch.empty(heads * batch, slices, kept, dtype=torch.int64, device=hidden.device)
    stats = torch.empty(heads * batch, slices, 2, dtype=torch.float32, device=hidden.device)
    arguments = (x, lm_head_weight, candidates, stats, *strides, batch, size, vocab, matrix_rows, row_tiles, slices)
    grid = matrices * slices * row_tiles
    steps.append(Call(lm_head_kernel, grid, arguments, {"KEPT": kept, **constants}, stages=target.stages(_STAGES)))

    count = slices * kept
    arguments = (candidates, stats, token_map, draft_tokens, logprobs, batch, heads, slices, count, top_k)
    constants = {"SLICES": block(slices, 1, 256), "COUNT": block(count, 1, _CANDIDATES)}
    steps.append(Call(merge_kernel, heads * batch, arguments, constants, warps=8))
    return steps


launch = launcher(calls)
