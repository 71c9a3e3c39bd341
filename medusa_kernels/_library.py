"""The ops as torch.library custom ops, through which torch.compile and torch.export see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def traced(op: str, *arguments: object):
    """Calls a custom op while PyTorch traces. The ops have no gradients, and of an argument that wants one the compiler
    would ask for their formula.
    """
    call = getattr(torch.ops.medusa_kernels, op)
    return call(*(a.detach() if isinstance(a, Tensor) and a.requires_grad else a for a in arguments))


def custom_op(op: str, *, mutates: Sequence[str] = ()) -> Callable[[Callable], torch.library.CustomOpDef]:
    """`torch.library.custom_op` in this package's namespace. One file registers all: PyTorch notes where each op comes
    from, and looks through every module it has for each file anew, 10 ms each.
    """

    def register(function: Callable) -> torch.library.CustomOpDef:
        return torch.library.custom_op(f"medusa_kernels::{op}", function, mutates_args=mutates)

    return register
