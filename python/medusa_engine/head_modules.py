"""The heads as PyTorch modules while they are trained, and what updates them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Heads(torch.nn.Module):
    """Residual SiLU blocks of every head, and the matrix by which all are told the root: zero weights, so that
    training starts from the base's own next-token guess.
    """

    def __init__(self, heads: int, layers: int, hidden_size: int, *, root: bool):
        super().__init__()
        self.root = torch.nn.Linear(hidden_size, hidden_size, bias=False) if root else None
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleList(torch.nn.Linear(hidden_size, hidden_size) for _ in range(layers)) for _ in range(heads)
        )
        for parameter in self.parameters():
            torch.nn.init.zeros_(parameter)

    def tell(self, hidden: Tensor, root: Tensor) -> Tensor:
        """What the heads read; root is the normed embedding of each row's token."""
        return hidden if self.root is None else hidden + self.root(root)

    def forward(self, x: Tensor, head: int) -> Tensor:
        for block in self.blocks[head]:
            x = x + F.silu(block(x))
        return x

    def stacked(self, name: str) -> Tensor:
        """Every block's "weight" or "bias" in one tensor (heads, layers, ...)."""
        return torch.stack([torch.stack([getattr(b, name).detach().cpu() for b in blocks]) for blocks in self.blocks])


class Optimizer:
    """Muon for the blocks' matrices, Adam for their biases."""

    def __init__(self, module: Heads, learning_rate: float, weight_decay: float):
        matrices = [p for p in module.parameters() if p.ndim == 2]
        biases = [p for p in module.parameters() if p.ndim == 1]
        self._parts = [
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay),
            torch.optim.Adam(biases, lr=0.1 * learning_rate, betas=(0.9, 0.95)),
        ]
        self._peaks = [group["lr"] for part in self._parts for group in part.param_groups]

    def step(self, schedule: float) -> None:
        """One update at `schedule` times the peak learning rate; gradients are dropped."""
        groups = [group for part in self._parts for group in part.param_groups]
        for group, peak in zip(groups, self._peaks, strict=True):
            group["lr"] = peak * schedule
        for part in self._parts:
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> list[dict]:
        return [part.state_dict() for part in self._parts]

    def restore(self, state: list[dict]) -> None:
        for part, saved in zip(self._parts, state, strict=True):
            part.load_state_dict(saved)
