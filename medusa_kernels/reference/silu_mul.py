"""SwiGLU's elementwise part (Shazeer, 2020): silu(gate) * up."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def launch(gate_up: Tensor, out: Tensor) -> None:
    gate, up = gate_up.float().chunk(2, dim=-1)
    out.copy_(F.silu(gate) * up)
