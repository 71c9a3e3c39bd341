"""silu_mul: the elementwise half of SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check
from ._backends import Native, resolve
from ._library import custom_op, traced
from .native.silu_mul import arguments
from .reference import silu_mul as reference

BACKENDS = {
    "reference": reference.launch,
    "cpu": Native("cpu", "silu_mul", arguments),
    "cuda": Native("cuda", "silu_mul", arguments),
}


def silu_mul(gate_up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) · up in fp32 (Shazeer, 2020).

    Args:
        gate_up: (rows, 2 · ffn) fp32, bf16 or fp16: the gate's columns, then the up projection's.
        backend: "auto", "reference", "cpu" or "cuda".

    Returns:
        (rows, ffn) in gate_up's dtype. Nothing else is written.

    Raises:
        TypeError, ValueError: gate_up is not as above.
    """
    if torch.compiler.is_compiling():
        return traced("silu_mul", gate_up, backend)
    return _checked(gate_up, backend)


def _checked(gate_up, backend):
    _check.tensor("gate_up", gate_up, shape=(None, None), dtype=_check.FLOATS)
    rows, width = gate_up.shape
    _check.in_range("gate_up's number of rows", rows, 1, 2**31 - 1)
    if width % 2 or not width:
        raise ValueError(f"gate_up must have an even number of columns, not {width}")
    if gate_up.stride(-1) != 1:
        gate_up = gate_up.contiguous()
    launch = resolve("silu_mul", BACKENDS, backend, gate_up.device)
    out = torch.empty(rows, width // 2, dtype=gate_up.dtype, device=gate_up.device)
    launch(gate_up, out)
    return out


@custom_op("silu_mul")
def _op(gate_up: Tensor, backend: str) -> Tensor:
    return _checked(gate_up, backend)


@_op.register_fake
def _fake(gate_up, backend):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
