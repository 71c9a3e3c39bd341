"""What crosses into C++: one `arguments` per op, from checked tensors to the addresses and sizes csrc/bindings.cpp takes.

The order is that of the binding, which is the same for the CPU and for CUDA; CUDA takes a stream after it.
"""

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
