"""linear for few rows, and the packing of its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _check
from ._backends import Native, resolve
from .native.linear import arguments, pack
from .reference import linear as reference

PACKED_DTYPES = ("float32", "bfloat16", "float16", "int8")


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """A weight in the layout the CPU kernels stream: opaque; made by `pack_linear`, taken wherever a weight is."""

    data: Tensor  # uint8, 64-byte aligned
    shape: tuple[int, ...]  # of the weight that was packed: (..., out_features, in_features)
    dtype: str  # one of PACKED_DTYPES
    device = torch.device("cpu")

    def check(self, name: str, shape: tuple[int | None, ...], device: torch.device) -> None:
        if len(shape) != len(self.shape) or any(w not in (None, f) for w, f in zip(shape, self.shape, strict=True)):
            text = ", ".join("any" if w is None else str(w) for w in shape)
            raise ValueError(f"{name} must have shape ({text}), not {self.shape} (packed)")
        if device.type != "cpu":
            raise ValueError(f"{name} is packed for the CPU, but the first argument is on {device}")


def check_weight(name: str, weight: Tensor | PackedLinear, shape: tuple[int | None, ...], device: torch.device) -> None:
    """A weight that is read where it lies: packed, or contiguous in all its dimensions."""
    if isinstance(weight, PackedLinear):
        weight.check(name, shape, device)
    else:
        _check.tensor(name, weight, shape=shape, dtype=_check.FLOATS, device=device)
        _check.dense_rows(name, weight, weight.dim())


BACKENDS = {
    "reference": reference.launch,
    "cpu": Native("cpu", "linear", arguments),
    "cuda": Native("cuda", "linear", arguments),
}


def pack_linear(weight: Tensor, dtype: str = "bfloat16") -> PackedLinear:
    """Rounds a weight to `dtype` and lays it out for the CPU kernels: done once, at load.

    Args:
        weight: (..., out_features, in_features) on the CPU, fp32, bf16 or fp16; leading dimensions make one matrix
        each.
        dtype: "float32", "bfloat16" or "float16" (round to nearest even), or "int8": one scale per output row; the left
            operand is then quantised too, one scale per row and group of 64 along in_features, with exact integer sums
            inside a group and fp32 between groups.

    Raises:
        TypeError, ValueError: an argument is not as above, or the compiled module is missing.
    """
    _check.tensor("weight", weight, dtype=_check.FLOATS)
    if weight.device.type != "cpu":
        raise ValueError(f"weight must be on the CPU to be packed, not on {weight.device}")
    if weight.dim() < 2 or not weight.numel():
        raise ValueError(f"weight must have shape (..., out_features, in_features), not {tuple(weight.shape)}")
    if dtype not in PACKED_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, PACKED_DTYPES))}, not {dtype!r}")
    resolve("linear", BACKENDS, "cpu", weight.device)
    return PackedLinear(pack(weight, dtype), tuple(weight.shape), dtype)


def linear(
    x: Tensor,
    weight: Tensor | PackedLinear,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """x @ weight.T + bias + residual, summed in fp32.

    On the CPU a row's result does not depend on the rows beside it: its sum over in_features has one order.

    Args:
        x: (rows, in_features) fp32, bf16 or fp16.
        weight: (out_features, in_features), or that packed by `pack_linear` (CPU).
        bias: (out_features,) or None.
        residual: (rows, out_features) of x's dtype, or None.
        backend: "auto", "reference", "cpu" or "cuda".

    Returns:
        (rows, out_features) in x's dtype. Nothing else is written.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    if torch.compiler.is_compiling() and isinstance(weight, Tensor):
        return torch.ops.medusa_kernels.linear(x, weight, bias, residual, backend)
    return _checked(x, weight, bias, residual, backend)


def _checked(x, weight, bias, residual, backend):
    _check.tensor("x", x, shape=(None, None), dtype=_check.FLOATS)
    rows, width = x.shape
    _check.in_range("x's number of rows", rows, 1, 2**31 - 1)
    _check.in_range("x's in_features", width, 1, 2**31 - 1)
    if isinstance(weight, PackedLinear):
        weight.check("weight", (None, width), x.device)
        if backend not in ("auto", "cpu"):
            raise ValueError(f"a packed weight runs on backend 'cpu', not {backend!r}")
    else:
        _check.tensor("weight", weight, shape=(None, width), dtype=_check.FLOATS, device=x.device)
        weight = weight.contiguous()
    outputs = weight.shape[0]
    _check.in_range("weight's out_features", outputs, 1, 2**31 - 1)
    if bias is not None:
        _check.tensor("bias", bias, shape=(outputs,), dtype=_check.FLOATS, device=x.device)
        bias = bias.contiguous()
    if residual is not None:
        _check.tensor("residual", residual, shape=(rows, outputs), dtype=x.dtype, device=x.device)
        residual = residual.contiguous()
    if x.stride(-1) != 1:
        x = x.contiguous()
    launch = resolve("linear", BACKENDS, backend, x.device)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    launch(x, weight, bias, residual, out)
    return out


@torch.library.custom_op("medusa_kernels::linear", mutates_args=())
def _op(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, backend: str) -> Tensor:
    return _checked(x, weight, bias, residual, backend)


@_op.register_fake
def _fake(x, weight, bias, residual, backend):
    return x.new_empty(x.shape[0], weight.shape[0])
