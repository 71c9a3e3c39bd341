"""What crosses into C++: one `arguments` per op, from checked tensors to the addresses and sizes csrc/bindings.cpp
takes.

The order is that of the binding, which is the same for the CPU and for CUDA; CUDA takes scratch memory and counters
after it, where an op needs them, and a stream.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # params.h: DType
PACKED = {"float32": 16, "bfloat16": 17, "float16": 18, "int8": 19}  # params.h: WeightFormat, from packed_f32 on


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def weight(value) -> tuple[int, int]:
    """Address and WeightFormat of a plain or packed weight."""
    if isinstance(value, Tensor):
        return value.data_ptr(), DTYPE[value.dtype]
    return value.data.data_ptr(), PACKED[value.dtype]


class Held(int):
    """The address of a tensor that lives as long as this number: a bound launch keeps its workspace so."""

    def __new__(cls, tensor: Tensor):
        number = super().__new__(cls, tensor.data_ptr())
        number.tensor = tensor
        return number


def with_workspace(op: str, arguments: Callable[..., tuple], library: object = None) -> Callable[..., tuple]:
    """`arguments`, then the memory CUDA needs between an op's blocks: scratch of any content, and counters that are 0.

    library: the compiled functions to ask how much; None is `_C.cuda`.
    """

    def cuda_arguments(*tensors) -> tuple:
        functions = library
        if functions is None:
            from medusa_kernels import _C

            functions = _C.cuda
        plain = arguments(*tensors)
        scratch_bytes, count = getattr(functions, f"{op}_workspace")(*plain)
        device = tensors[0].device
        return (*plain, Held(_scratch(device, scratch_bytes)), Held(_counters(device, count)))

    return cuda_arguments


# One stream's launches follow one another, so they share a workspace: a model's layers would otherwise hold one each.
_Stream = tuple[torch.device, int]
# Only the last, largest one. Those it outgrew live as long as the launches that are bound to them.
_SCRATCH: dict[_Stream, Tensor] = {}
# Kernels leave their counters at 0. All of them stay: a captured graph may hold the address of any.
_COUNTERS: dict[_Stream, list[Tensor]] = {}


def _stream(device: torch.device) -> _Stream:
    return device, torch.cuda.current_stream(device).cuda_stream


def _scratch(device: torch.device, size: int) -> Tensor:
    # What a capture allocates is its graph's, for as long as that lives: longer than the launches it was captured from.
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.empty(size, dtype=torch.uint8, device=device)
    kept = _SCRATCH.get(_stream(device))
    if kept is None or kept.numel() < size:
        kept = _SCRATCH[_stream(device)] = torch.empty(size, dtype=torch.uint8, device=device)
    return kept


def _counters(device: torch.device, count: int) -> Tensor:
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    kept = _COUNTERS.setdefault(_stream(device), [])
    if kept and kept[-1].numel() >= count:
        return kept[-1]
    fresh = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    # Under capture the zeros are written when the graph is replayed, not now: they are this launch's alone.
    if not torch.cuda.is_current_stream_capturing():
        kept.append(fresh)
    return fresh
