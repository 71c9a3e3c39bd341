"""compact_kv: one launch for all layers. A program reads its columns of the whole path, then writes them: each row is
in flight at once, and none is overwritten before it is read.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import Call, Target, block, launcher

_TILE = 4096  # elements a program holds


@triton.jit
def compact_kv_kernel(
    kv_cache,  # (layers, 2, batch, max_seqlen, columns)
    accepted_nodes,  # (batch, width)
    accept_length,  # (batch,)
    cache_seqlens,  # (batch,)
    layer_stride,
    kv_stride,
    batch_stride,
    row_stride,
    batch,
    width,
    columns,
    column_blocks,
    PATH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    column = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    b = program // column_blocks % batch
    layer_kv = (program // column_blocks // batch).to(tl.int64)
    base = layer_kv // 2 * layer_stride + layer_kv % 2 * kv_stride + b.to(tl.int64) * batch_stride
    first_row = kv_cache + base + tl.load(cache_seqlens + b).to(tl.int64) * row_stride

    at = tl.arange(0, PATH)
    node = tl.load(accepted_nodes + b * width + at, mask=at <= tl.load(accept_length + b), other=-1)
    moved = (node > at)[:, None] & (column < columns)[None, :]
    rows = tl.load(first_row + node.to(tl.int64)[:, None] * row_stride + column[None, :], mask=moved)
    tl.debug_barrier()  # a row's new place may be another's old one
    tl.store(first_row + at.to(tl.int64)[:, None] * row_stride + column[None, :], rows, mask=moved)


def calls(
    target: Target, kv_cache: Tensor, accepted_nodes: Tensor, accept_length: Tensor, cache_seqlens: Tensor
) -> list[Call]:
    layers, _, batch, _, kv_heads, head_dim = kv_cache.shape
    width, columns = accepted_nodes.shape[1], kv_heads * head_dim
    path = block(width, 1, 256)
    tile = block(columns, 16, _TILE // path)
    blocks = triton.cdiv(columns, tile)
    arguments = (kv_cache, accepted_nodes, accept_length, cache_seqlens, *kv_cache.stride()[:4])
    return [
        Call(
            compact_kv_kernel,
            layers * 2 * batch * blocks,
            (*arguments, batch, width, columns, blocks),
            {"PATH": path, "COLUMNS": tile},
        )
    ]


launch = launcher(calls)
