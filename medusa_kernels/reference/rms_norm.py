"""RMSNorm (Zhang and Sennrich, 2019): x / sqrt(mean(x^2) + eps) * weight, in fp32."""

import torch
from torch import Tensor


@torch.no_grad()
def launch(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor) -> None:
    if residual is not None:
        residual.copy_(residual.float() + x.float())
        x = residual
    out.copy_(normalise(x.float(), weight, eps))


def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * weight.float()
