"""x @ weight.T + bias + residual, summed in fp32."""

import torch
from torch import Tensor


@torch.no_grad()
def launch(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    result = x.float() @ weight.float().T
    if bias is not None:
        result += bias.float()
    if residual is not None:
        result += residual.float()
    out.copy_(result)
