"""linear, made for few rows, and the packing of its weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _check
from ._backends import Native, resolve
from ._library import custom_op, traced
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


def op_weight(weight: Tensor | PackedLinear) -> tuple[Tensor, list[int], str]:
    """A weight as the custom ops take it: a tensor, and if it is packed the shape and the dtype that it stands for."""
    return (weight.data, list(weight.shape), weight.dtype) if isinstance(weight, PackedLinear) else (weight, [], "")


def weight_of_op(tensor: Tensor, packed_shape: list[int], packed_dtype: str) -> Tensor | PackedLinear:
    """The inverse of `op_weight`."""
    return PackedLinear(tensor, tuple(packed_shape), packed_dtype) if packed_dtype else tensor


def resolve_weights(
    op: str, backends: Mapping[str, Callable[..., None]], backend: str, device: torch.device, *weights: object
) -> Callable[..., None]:
    """`resolve` of an op that reads these weights: packed ones are the CPU's."""
    if any(isinstance(weight, PackedLinear) for weight in weights):
        if backend not in ("auto", "cpu"):
            raise ValueError(f"a packed weight runs on backend 'cpu', not {backend!r}")
        backend = "cpu"
    return resolve(op, backends, backend, device)


def check_weight(name: str, weight: Tensor | PackedLinear, shape: tuple[int | None, ...], device: torch.device) -> None:
    """A weight that is read where it lies: packed, or contiguous in all its dimensions."""
    if isinstance(weight, PackedLinear):
        weight.check(name, shape, device)
    else:
        _check.tensor(name, weight, shape=shape, dtype=_check.FLOATS, device=device)
        _check.dense_rows(name, weight, weight.dim())


# Up to so many rows our CUDA kernel multiplies, beyond them PyTorch's product: the kernel reads x anew for every 16
# features, from here on more than it reads of the weight. Reckoned, not measured: it awaits both at 16, 32 and 64 rows.
FEW_ROWS = 16
_HALF_SUMS = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}


class CudaLinear(Native):
    """Our kernel for few rows, PyTorch's product for many.

    PyTorch multiplies what is of one 16-bit dtype. In fp32 it may have been told to use TF32, and mixed dtypes it would
    have to convert: these stay with our kernel whatever the rows.
    """

    def bind(self, x, weight, bias, residual, out) -> Callable[[], None]:
        one_dtype = all(t is None or t.dtype == x.dtype for t in (weight, bias))
        if len(x) <= FEW_ROWS or x.dtype not in _HALF_SUMS or not one_dtype:
            return super().bind(x, weight, bias, residual, out)
        call = functools.partial(multiply, x, weight, bias, residual, out)
        call.launch = self
        return call


@torch.no_grad()
def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    """linear's launch by PyTorch's product, for 16-bit tensors of one dtype. Its result is rounded once, and once more
    where there are both a bias and a residual, which may be `out` itself.
    """
    added = bias if residual is None else residual
    with _fp32_sums(x.dtype):
        if added is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(added, x, weight.t(), out=out)
    if added is not bias and bias is not None:
        out.add_(bias)


@contextlib.contextmanager
def _fp32_sums(dtype: torch.dtype) -> Iterator[None]:
    """PyTorch's default lets cuBLAS add up the parts of a split sum in 16 bits."""
    flags, name = torch.backends.cuda.matmul, _HALF_SUMS[dtype]
    if not getattr(flags, name):
        yield
        return
    setattr(flags, name, False)
    try:
        yield
    finally:
        setattr(flags, name, True)


BACKENDS = {
    "reference": reference.launch,
    "cpu": Native("cpu", "linear", arguments),
    "cuda": CudaLinear("cuda", "linear", arguments),
}
# Those whose sums have one order, which in_features alone decides.
ROW_INVARIANT = {"cpu": BACKENDS["cpu"], "cuda": Native("cuda", "linear", arguments)}


def resolve_row_invariant(backend: str, device: torch.device) -> Callable[..., None]:
    """The launch of `ROW_INVARIANT`. Raises ValueError where there is none."""
    return resolve("row-invariant linear", ROW_INVARIANT, device.type if backend == "auto" else backend, device)


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
    row_invariant: bool = False,
    backend: str = "auto",
) -> Tensor:
    """x @ weight.T + bias + residual, summed in fp32.

    Args:
        x: (rows, in_features) fp32, bf16 or fp16.
        weight: (out_features, in_features) fp32, bf16 or fp16, or that packed by `pack_linear` (CPU).
        bias: (out_features,) fp32, bf16 or fp16, or None.
        residual: (rows, out_features) of x's dtype, or None.
        row_invariant: a row's bits do not depend on the rows beside it: its sum over in_features has one order. So it
            always is on the CPU; CUDA then does without PyTorch's product, which is faster for many rows. The reference
            cannot.
        backend: "auto", "reference", "cpu" or "cuda".

    Returns:
        (rows, out_features) in x's dtype. Nothing else is written.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    if torch.compiler.is_compiling():
        tensor, *packed = op_weight(weight)
        return traced("linear", x, tensor, bias, residual, row_invariant, backend, *packed)
    return _checked(x, weight, bias, residual, row_invariant, backend)


def _checked(x, weight, bias, residual, row_invariant, backend):
    _check.tensor("x", x, shape=(None, None), dtype=_check.FLOATS)
    rows, width = x.shape
    _check.in_range("x's number of rows", rows, 1, 2**31 - 1)
    _check.in_range("x's in_features", width, 1, 2**31 - 1)
    if isinstance(weight, PackedLinear):
        weight.check("weight", (None, width), x.device)
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
    if row_invariant:
        launch = resolve_row_invariant(backend, x.device)
    else:
        launch = resolve_weights("linear", BACKENDS, backend, x.device, weight)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    launch(x, weight, bias, residual, out)
    return out


@custom_op("linear")
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    row_invariant: bool,
    backend: str,
    packed_shape: list[int],
    packed_dtype: str,
) -> Tensor:
    weight = weight_of_op(weight, packed_shape, packed_dtype)
    return _checked(x, weight, bias, residual, row_invariant, backend)


@_op.register_fake
def _fake(x, weight, bias, residual, row_invariant, backend, packed_shape, packed_dtype):
    return x.new_empty(x.shape[0], weight_of_op(weight, packed_shape, packed_dtype).shape[0])
