"""Argument checks for the front doors: each raises TypeError or ValueError naming the argument, what it was and what
it must be.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .tree import MAX_NODES as MAX_NODES

_F32 = torch.finfo(torch.float32)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def tensor(
    name: str,
    value: object,
    *,
    shape: Sequence[int | None] | None = None,
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Returns `value` once it is a tensor of this shape (None: any size), dtype (one or several) and device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if dtype is not None:
        allowed = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
        if value.dtype not in allowed:
            raise TypeError(f"{name} must have dtype {' or '.join(map(_short, allowed))}, not {_short(value.dtype)}")
    if shape is not None:
        wanted = tuple(shape)
        found = tuple(value.shape)
        if len(found) != len(wanted) or any(w is not None and w != f for w, f in zip(wanted, found, strict=True)):
            text = ", ".join("any" if w is None else str(w) for w in wanted) + "," * (len(wanted) == 1)
            raise ValueError(f"{name} must have shape ({text}), not {found}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, like the first argument, not on {value.device}")
    return value


def dense_rows(name: str, value: Tensor, inner: int = 1) -> Tensor:
    """The last `inner` dimensions must lie contiguous in memory; strides before them are free."""
    if not value.numel():
        return value
    step = 1
    for dim in range(value.dim() - 1, value.dim() - 1 - inner, -1):
        if value.shape[dim] != 1 and value.stride(dim) != step:
            raise ValueError(
                f"{name} must be contiguous in its last {inner} dimension(s); its strides are {value.stride()}"
            )
        step *= value.shape[dim]
    return value


def in_range(name: str, value: int | float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {value}")


def number(name: str, value: object) -> float:
    """An int or float that fp32 can hold, as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not -_F32.max <= value <= _F32.max:  # NaN neither
        raise ValueError(f"{name} must be finite in fp32, not {value!r:.60}")
    return float(value)


def positive(name: str, value: object) -> float:
    """A number that fp32 can hold and that is above 0 there, as a float."""
    if (found := number(name, value)) < _F32.tiny:
        raise ValueError(f"{name} must be above 0 in fp32, not {value}")
    return found


def one_walk(first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Two tensors of one shape are walked alike; a dimension of one element is never walked."""
    steps = [(x, y) for x, y, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size > 1]
    if any(x != y for x, y in steps):
        raise ValueError(f"{second} must have {first}'s strides {a.stride()}, not {b.stride()}")


def writable(name: str, value: Tensor) -> Tensor:
    """A tensor changed in place must not be an expanded view, whose elements share memory."""
    if any(step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True)):
        raise ValueError(f"{name} is written, so its elements must not share memory; its strides are {value.stride()}")
    return value


def integer(name: str, value: object, low: int, high: int) -> int:
    """Any integer, NumPy's too, as an int within [low, high]."""
    try:
        value = operator.index(None if isinstance(value, (bool, Tensor)) else value)
    except TypeError:  # also an array's, which has __index__ and cannot use it
        raise TypeError(f"{name} must be an int, not {type(value).__name__}") from None
    in_range(name, value, low, high)
    return value


def values_wanted(device: torch.device) -> bool:
    """Whether tensor values are checked: always on the CPU; elsewhere only when MEDUSA_KERNELS_CHECK=1, since it
    stops the stream.
    """
    return device.type == "cpu" or os.environ.get("MEDUSA_KERNELS_CHECK") == "1"


def all_between(name: str, value: Tensor, low: int, high: int) -> None:
    """Every element of an integer tensor lies in [low, high]."""
    if value.numel() == 0:
        return
    smallest, largest = (int(x) for x in torch.aminmax(value))
    if smallest < low or largest > high:
        found = smallest if smallest < low else largest
        raise ValueError(f"{name} must hold values between {low} and {high}; it holds {found}")


def tree_mask(value: object, batch: int, n: int, device: torch.device) -> Tensor:
    """int64 (n, words) or (batch, n, words); every node sees itself and no bit past n is set."""
    words = (n + 63) // 64
    mask = tensor("tree_mask", value, dtype=torch.int64, device=device)
    if tuple(mask.shape) not in ((n, words), (batch, n, words)):
        raise ValueError(
            f"tree_mask must have shape ({n}, {words}) or ({batch}, {n}, {words}), not {tuple(mask.shape)}"
        )
    mask = mask.contiguous()
    if values_wanted(device):
        rows = torch.arange(n, device=device)
        own = mask.gather(-1, (rows // 64).expand(mask.shape[:-1]).unsqueeze(-1)).squeeze(-1)
        blind = ((own >> (rows % 64)) & 1) == 0
        if bool(blind.any()):
            row = int(blind.nonzero()[0, -1])
            raise ValueError(f"tree_mask must let every node see itself; bit {row} of row {row} is clear")
        spare = words * 64 - n
        # The shift is arithmetic: masking off the copies of the sign bit leaves exactly the spare bits.
        beyond = (mask[..., -1] >> (64 - spare)) & ((1 << spare) - 1) if spare else None
        if spare and bool(beyond.any()):
            row = int(beyond.nonzero()[0, -1])
            raise ValueError(f"tree_mask must have every bit from {n} up clear (n is {n}); row {row} has one set")
    return mask


def parents(value: object, batch: int, n: int, device: torch.device) -> Tensor:
    """int32 (n,) or (batch, n); -1 for the root at 0, and every parent precedes its child."""
    result = tensor("parents", value, dtype=torch.int32)
    if tuple(result.shape) not in ((n,), (batch, n)):
        raise ValueError(f"parents must have shape ({n},) or ({batch}, {n}), not {tuple(result.shape)}")
    if str(result.device) not in (places := dict.fromkeys(("cpu", str(device)))):
        raise ValueError(f"parents must be on {' or '.join(places)}, not on {result.device}")
    if values_wanted(result.device):
        order = torch.arange(n, dtype=torch.int32, device=result.device)
        if bool((result[..., 0] != -1).any()):
            raise ValueError("parents must be -1 at node 0, the root")
        if bool(((result >= order) | (result < 0))[..., 1:].any()):
            raise ValueError("parents must name an earlier node for every node but the root")
    return result.to(device).contiguous()


def cache_seqlens(value: object, batch: int, cache: str, rows: int, needed: int, device: torch.device) -> Tensor:
    """int32 (batch,), each leaving `needed` of the `rows` rows of the argument `cache`."""
    result = tensor("cache_seqlens", value, shape=(batch,), dtype=torch.int32, device=device)
    if rows < needed:
        raise ValueError(
            f"{cache} has max_seqlen {rows}; it must be at least {needed}: a row for each node of the step"
        )
    if values_wanted(device):
        all_between("cache_seqlens", result, 0, rows - needed)
    return result.contiguous()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
