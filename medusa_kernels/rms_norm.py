"""rms_norm: RMSNorm over the last dimension, with the residual addition before it if wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check
from ._backends import Native, resolve
from ._library import custom_op, traced
from .native.rms_norm import arguments
from .reference import rms_norm as reference

BACKENDS = {
    "reference": reference.launch,
    "cpu": Native("cpu", "rms_norm", arguments),
    "cuda": Native("cuda", "rms_norm", arguments),
}


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, backend: str = "auto") -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, per row, summed in fp32 (Zhang and Sennrich, 2019).

    Args:
        x: (rows, hidden) fp32, bf16 or fp16, hidden contiguous.
        weight: (hidden,) fp32, bf16 or fp16.
        eps: added to the mean square; > 0.
        residual: (rows, hidden) of x's dtype, or None. When given, residual += x in place and the sum is normalised.
        backend: "auto", "reference", "cpu" or "cuda".

    Returns:
        (rows, hidden) in x's dtype. Only `residual` is written besides.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    if torch.compiler.is_compiling():
        return traced("rms_norm", x, weight, eps, residual, backend)
    return _checked(x, weight, eps, residual, backend)


def _checked(x, weight, eps, residual, backend):
    _check.tensor("x", x, shape=(None, None), dtype=_check.FLOATS)
    rows, hidden = x.shape
    _check.in_range("x's number of rows", rows, 1, 2**31 - 1)
    _check.tensor("weight", weight, shape=(hidden,), dtype=_check.FLOATS, device=x.device)
    eps = _check.positive("eps", eps)
    if residual is not None:
        _check.tensor("residual", residual, shape=(rows, hidden), dtype=x.dtype, device=x.device)
        _check.dense_rows("residual", _check.writable("residual", residual))
    if x.stride(-1) != 1:
        x = x.contiguous()
    launch = resolve("rms_norm", BACKENDS, backend, x.device)
    out = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    launch(x, weight.contiguous(), eps, residual, out)
    return out


@custom_op("rms_norm", mutates=("residual",))
def _op(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, backend: str) -> Tensor:
    return _checked(x, weight, eps, residual, backend)


@_op.register_fake
def _fake(x, weight, eps, residual, backend):
    return x.new_empty(x.shape)
