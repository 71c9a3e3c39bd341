from torch import Tensor

from . import DTYPE, address


def arguments(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor) -> tuple:
    return (
        *map(address, (x, residual, weight, out)),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        *x.shape,
        eps,
        DTYPE[x.dtype],
        DTYPE[weight.dtype],
    )
