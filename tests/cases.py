"""Random inputs. What an op must not read is NaN: rows past the tree, gaps between rows of a strided view, unused
padding."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from medusa_kernels import Tree

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
F32, BF16, F16 = SHORT


def generator(name: object) -> torch.Generator:
    """The same numbers for the same case on every machine."""
    return torch.Generator().manual_seed(zlib.crc32(str(name).encode()))


def normal(shape: Sequence[int], dtype: torch.dtype, g: torch.Generator, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=g) * scale).to(dtype)


def integers(shape: Sequence[int], low: int, high: int, g: torch.Generator, dtype: torch.dtype = torch.int32) -> Tensor:
    """low..high inclusive."""
    return torch.randint(low, high + 1, tuple(shape), generator=g, dtype=dtype)


def poison(dtype: torch.dtype) -> float | int:
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min


def strided(value: Tensor, pad: int = 1, keep: int = 1) -> Tensor:
    """The same values as a view with gaps of poison in every dimension but the last `keep`."""
    free = value.dim() - keep
    buffer = value.new_full([s + 2 * pad if d < free else s for d, s in enumerate(value.shape)], poison(value.dtype))
    view = buffer[tuple(slice(pad, pad + s) for s in value.shape[:free])]
    return view.copy_(value)


def spaced(value: Tensor) -> Tensor:
    """The same values as a view with poison between neighbours of the last dimension."""
    buffer = value.new_full((*value.shape, 2), poison(value.dtype))
    return buffer[..., 0].copy_(value)


def transposed(value: Tensor) -> Tensor:
    """The same values, the last dimension not contiguous."""
    return value.transpose(-1, -2).contiguous().transpose(-1, -2)


def random_tree(n: int, g: torch.Generator, max_rank: int = 12) -> Tree:
    """n nodes, each hung below a random earlier one."""
    paths: list[tuple[int, ...]] = [()]
    children = [0]
    while len(paths) < n:
        at = int(torch.randint(len(paths), (1,), generator=g))
        if children[at] < max_rank:
            paths.append((*paths[at], children[at]))
            children[at] += 1
            children.append(0)
    return Tree.from_choices([list(path) for path in paths[1:]])


def tree_of(kind: str, n: int, g: torch.Generator) -> Tree:
    """ "chain", "star" (every node a child of the root) or "random"."""
    if kind == "chain":
        return Tree.from_choices([[0] * depth for depth in range(1, n)])
    if kind == "star":
        return Tree.from_choices([[rank] for rank in range(n - 1)])
    return random_tree(n, g)


def ragged(batch: int, highest: int, g: torch.Generator) -> Tensor:
    """Cache lengths: the first sequence is new, the last is full, the others lie between."""
    lengths = integers([batch], 0, highest, g)
    lengths[-1] = highest
    lengths[0] = 0 if batch > 1 else highest
    return lengths
