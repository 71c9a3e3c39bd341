from torch import Tensor

from . import DTYPE


def arguments(gate_up: Tensor, out: Tensor) -> tuple:
    return gate_up.data_ptr(), out.data_ptr(), gate_up.stride(0), *out.shape, DTYPE[gate_up.dtype]
