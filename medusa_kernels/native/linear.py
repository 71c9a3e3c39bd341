from torch import Tensor

from . import DTYPE, PACKED, address, weight
from .memory import huge_empty


def arguments(x: Tensor, w, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> tuple:
    matrix, weight_format = weight(w)
    return (
        *(x.data_ptr(), matrix, *map(address, (bias, residual, out))),
        *(x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0)),
        *(*x.shape, out.shape[1]),
        DTYPE[x.dtype],
        0 if bias is None else DTYPE[bias.dtype],
        weight_format,
    )


def pack(value: Tensor, dtype: str) -> Tensor:
    """(..., out_features, in_features) -> uint8, in the layout that csrc/cpu/matmul.h describes."""
    from medusa_kernels import _C

    matrices = value.contiguous().view(-1, *value.shape[-2:])
    size = _C.cpu.packed_bytes(*matrices.shape, PACKED[dtype])
    data = huge_empty(size)
    _C.cpu.pack(matrices.data_ptr(), data.data_ptr(), *matrices.shape, DTYPE[value.dtype], PACKED[dtype])
    return data
