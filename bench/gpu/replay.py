"""Acceptance replayed: random weights accept nothing, so a step's own result is overwritten by one drawn beforehand.

`verify_tree` runs in full all the same. What is drawn follows the product rule over the tree: each head's published
accuracy, rescaled so that the mean is the tokens per step that was published.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medusa_engine.decode import Decoder
from medusa_kernels import Tree

# Top-1 .. top-5 accuracy of each head, Vicuna-7B, Medusa-1 training (FasterDecoding/Medusa, published with the trees).
TOP_ACCURACY = [
    [0.5604, 0.6717, 0.7271, 0.7599, 0.7799],
    [0.3164, 0.4236, 0.4851, 0.5282, 0.5625],
    [0.2010, 0.2879, 0.3475, 0.3834, 0.4169],
    [0.1474, 0.2250, 0.2737, 0.3109, 0.3397],
    [0.1175, 0.1866, 0.2346, 0.2721, 0.2998],
]
TOKENS_PER_STEP = {"medusa-1": 2.565, "medusa-2": 3.47}  # recorded greedy MT-bench run; the paper


def per_rank(top: list[list[float]], power: float = 1.0) -> list[list[float]]:
    """accuracy[head][rank] from cumulative accuracies, every head's misses raised to `power`: 2 halves them or more."""
    raised = [[1 - (1 - p) ** power for p in row] for row in top]
    return [[b - a for a, b in zip([0.0, *row], row, strict=False)] for row in raised]


def tree_of(num_nodes: int) -> Tree:
    return Tree.search(per_rank(TOP_ACCURACY), num_nodes)


def reach(tree: Tree, accuracy: list[list[float]]) -> list[float]:
    """How likely each node, the root first, is on the accepted path."""
    likely = [1.0]
    for path, parent in zip(tree.choices, tree.parents[1:].tolist(), strict=True):
        likely.append(likely[parent] * accuracy[len(path) - 1][path[-1]])
    return likely


def rescaled(tree: Tree, tokens_per_step: float) -> list[list[float]]:
    """The published accuracies, made better or worse alike until the tree's mean is `tokens_per_step`.

    Raises:
        ValueError: no accuracy reaches it: the tree is not that deep.
    """
    if not 1 < tokens_per_step < 1 + tree.max_depth:
        raise ValueError(f"tokens_per_step must be between 1 and {1 + tree.max_depth}, not {tokens_per_step}")
    low, high = 0.0, 64.0
    for _ in range(60):
        power = (low + high) / 2
        if sum(reach(tree, per_rank(TOP_ACCURACY, power))) < tokens_per_step:
            low = power
        else:
            high = power
    return per_rank(TOP_ACCURACY, high)


def draw(tree: Tree, tokens_per_step: float, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """The last accepted node of each step, int64 of `shape`: every node as often as its share says, shuffled."""
    likely = torch.tensor(reach(tree, rescaled(tree, tokens_per_step)), dtype=torch.float64)
    last = likely.clone()
    last.index_add_(0, tree.parents[1:].long(), likely[1:], alpha=-1)  # the path goes on to one of the children
    count = int(torch.tensor(shape).prod())
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    nodes = torch.searchsorted(last.clamp(min=0).cumsum(0), quantiles).clamp(max=tree.num_nodes - 1)
    return nodes[torch.randperm(count, generator=torch.Generator().manual_seed(seed))].view(shape)


class ReplayedDecoder(Decoder):
    """A decoder whose steps accept what was drawn: for time, not for text."""

    def replay(self, nodes: Tensor) -> None:
        """nodes int64 (steps, batch): the last accepted node of each step; after the last the first again."""
        paths = torch.full((self.tree.num_nodes, self.tree.max_depth + 1), -1, dtype=torch.int32)
        for node, (depth, parent) in enumerate(zip(self.tree.depths.tolist(), self.tree.parents.tolist(), strict=True)):
            if node:
                paths[node] = paths[parent]
            paths[node, depth] = node
        device = self.model.device
        self._replayed_nodes = paths[nodes].to(device)
        self._replayed_length = self.tree.depths[nodes].int().to(device)
        self._replayed_at = torch.zeros(1, dtype=torch.int64, device=device)

    def accept(self) -> None:
        super().accept()
        torch.index_select(self._replayed_nodes, 0, self._replayed_at, out=self.accepted_nodes[None])
        torch.index_select(self._replayed_length, 0, self._replayed_at, out=self.accept_length[None])
        self._replayed_at.add_(1).remainder_(len(self._replayed_length))
