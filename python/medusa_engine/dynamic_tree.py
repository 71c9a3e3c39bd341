"""Trees that are grown anew at every step, from the nodes that the heads themselves find most probable.

The heads are independent given the hidden row, so a node's probability is the product of its path's: the n - 1 most
probable paths, which always form a tree, are the tree with the most expected tokens (Tree.search, with this step's
probabilities for the average ones). Everything is a few tensor operations on the device, with no loop over nodes and
without the host: a step stays capturable as one graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medusa_kernels import Tree

MAX_TOP_K = 64  # ranks of a head that are candidates: so many the kernels find without storing the logits
_LEAST = -50.0  # log-probabilities below it are as good as none
_STEP = 1e-3  # taken off per depth, so that a parent is ahead of its children also where they are certain


class Layout(NamedTuple):
    """A tree as the kernels read it: of a static tree (n, ...), of trees that differ by sequence (batch, n, ...)."""

    depths: Tensor  # int32
    tree_mask: Tensor  # int64, words of 64 nodes
    parents: Tensor  # int32


@dataclass(frozen=True)
class DynamicTree:
    """The `num_nodes` most probable nodes of every step, root counted.

    Attributes:
        num_heads, top_k: what the drafter can fill; the tree has at most the nodes that these give it.
        temperatures: per head: its logits are taken divided by it, since heads are overconfident; () is 1 for all.
    """

    num_nodes: int
    num_heads: int
    top_k: int
    temperatures: tuple[float, ...] = field(default=())

    @classmethod
    def of(cls, num_nodes: int, num_heads: int, vocab_size: int, temperatures: tuple[float, ...] = ()) -> DynamicTree:
        """Raises ValueError unless there is one positive temperature for each head, or none at all."""
        if temperatures and (len(temperatures) != num_heads or not all(0 < t < float("inf") for t in temperatures)):
            raise ValueError(f"temperatures must be {num_heads} positive numbers, one per head, not {temperatures}")
        top_k = min(num_nodes - 1, vocab_size, MAX_TOP_K)
        return cls(min(num_nodes, candidates(num_nodes, num_heads, top_k).count), num_heads, top_k, tuple(temperatures))

    @property
    def max_depth(self) -> int:
        return min(self.num_heads, self.num_nodes - 1)

    @property
    def name(self) -> str:
        return f"dynamic-{self.num_nodes}"

    @cached_property
    def candidates(self) -> Candidates:
        return candidates(self.num_nodes, self.num_heads, self.top_k)

    def grown(self, nodes: Tensor) -> Tree:
        """The tree of these candidates, ascending and the root first, as `Growth` chooses them."""
        paths = self.candidates.ranks[nodes.cpu()[1:]].tolist()
        return Tree.from_choices([[rank for rank in path if rank >= 0] for path in paths])


class Candidates(NamedTuple):
    """Every node that can be among the most probable ones, by depth, then path; row 0 is the root.

    Heads list their guesses by falling probability. So beside the node of ranks (r1, ..., rd), the r1 + 1 nodes (s1)
    with s1 <= r1, the (r1 + 1)(r2 + 1) nodes (s1, s2) with s1 <= r1 and s2 <= r2, and so on are at least as probable:
    a node whose sum of these exceeds the wanted count is never needed. What is left is few: 1,456 of 16 million for 64
    nodes of four heads.

    Attributes:
        ranks: int64 (count, heads), the node's path, -1 beyond its end.
        lineage: int64 (count, heads), its ancestor at each depth from 1 on, itself included; 0 beyond its end.
        depths, parents: int64 (count,).
    """

    ranks: Tensor
    lineage: Tensor
    depths: Tensor
    parents: Tensor

    @property
    def count(self) -> int:
        return len(self.depths)


@lru_cache(maxsize=8)
def candidates(num_nodes: int, num_heads: int, top_k: int) -> Candidates:
    ranks, lineage = np.full((1, num_heads), -1), np.zeros((1, num_heads), dtype=np.int64)
    boxes, ahead = np.ones(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    levels, parents, first = [(ranks, lineage)], [np.zeros(1, dtype=np.int64)], 0
    for depth in range(num_heads):
        children = np.minimum((num_nodes - 1 - ahead) // boxes, top_k)
        parent = np.repeat(np.arange(len(children)), children)
        rank = np.arange(len(parent)) - np.repeat(children.cumsum() - children, children)
        parents.append(first + parent)
        first += len(children)
        ranks, lineage = ranks[parent], lineage[parent]
        ranks[:, depth], lineage[:, depth] = rank, first + np.arange(len(parent))
        boxes = boxes[parent] * (rank + 1)
        ahead = ahead[parent] + boxes
        levels.append((ranks, lineage))
    all_ranks, all_lineage = (torch.from_numpy(np.concatenate(level)) for level in zip(*levels, strict=True))
    return Candidates(all_ranks, all_lineage, (all_ranks >= 0).sum(dim=1), torch.from_numpy(np.concatenate(parents)))


def tempered(logprobs: Tensor, temperatures: Tensor) -> Tensor:
    """Log-probabilities (..., heads, top_k) of heads whose logits are divided by their temperature, from the top k.

    p^(1/T) / Z needs Z over the whole vocabulary, of which only the top k and so the mass m of the others are known.
    The others' share of Z is taken as if each had the last known probability q: m / q tokens of q^(1/T) each. That is
    exact at T = 1 and where nothing is left over, and the least it can be for T > 1.
    """
    inverse = (1 / temperatures)[:, None]
    last = logprobs[..., -1:]
    rest = (1 - logprobs.exp().sum(dim=-1, keepdim=True)).clamp(min=1e-9).log()
    scaled = logprobs * inverse
    tail = rest + last * (inverse - 1)
    return scaled - torch.logsumexp(torch.cat([scaled, tail], dim=-1), dim=-1, keepdim=True)


class Growth:
    """Chooses the nodes of every sequence's tree from its heads' log-probabilities.

    Attributes:
        nodes: int64 (batch, n), ids of the chosen candidates, ascending: the root first, a parent before its children.
        layout: what the kernels read of them; a call writes it.
        slots: int64 (batch, n - 1), where each node's token lies among one sequence's heads * top_k draft tokens.
    """

    def __init__(self, tree: DynamicTree, layout: Layout):
        found, device, batch = tree.candidates, layout.parents.device, len(layout.parents)
        self.layout, self._tree, self._chosen = layout, tree, tree.num_nodes - 1
        self._depths, self._parents, self._lineage = (
            t.to(device) for t in (found.depths, found.parents, found.lineage)
        )
        heads = torch.arange(tree.num_heads, device="cpu")
        slots = torch.where(found.ranks >= 0, heads * tree.top_k + found.ranks, tree.num_heads * tree.top_k)
        self._slots = slots.gather(1, (found.depths[:, None] - 1).clamp(min=0))[:, 0].to(device)
        self._path_slots = slots[1:].flatten().to(device)
        known = tree.temperatures
        self._temperatures = torch.tensor(known, dtype=torch.float32, device=device) if known else None
        self.nodes = torch.zeros(batch, tree.num_nodes, dtype=torch.int64, device=device)
        self.slots = torch.zeros(batch, self._chosen, dtype=torch.int64, device=device)
        # Where a candidate stands in the tree; only those of chosen nodes are read, and those are new at each step.
        self._place = torch.zeros(batch, found.count, dtype=torch.int64, device=device)
        self._order = torch.arange(tree.num_nodes, device=device).expand(batch, -1)

    def __call__(self, logprobs: Tensor) -> None:
        """logprobs: fp32 (batch, heads, top_k), falling along each row."""
        batch, nodes = len(self.nodes), self.nodes
        if self._temperatures is not None:
            logprobs = tempered(logprobs, self._temperatures)
        gains = torch.nan_to_num(logprobs, nan=_LEAST).clamp(min=_LEAST) - _STEP
        gains = F.pad(gains.view(batch, -1), (0, 1))  # beyond a path's end: 0
        scores = gains.index_select(1, self._path_slots).view(batch, -1, self._tree.num_heads).sum(dim=2)
        nodes[:, 1:] = scores.topk(self._chosen, dim=1).indices.sort(dim=1).values + 1
        self._place.scatter_(1, nodes, self._order)
        self.slots.copy_(self._slots[nodes[:, 1:]])
        self.layout.depths.copy_(self._depths[nodes])
        self.layout.parents[:, 1:] = self._place.gather(1, self._parents[nodes[:, 1:]])
        line = self._place.gather(1, self._lineage[nodes].view(batch, -1)).view(batch, *nodes.shape[1:], -1)
        bits = torch.where(line > 0, torch.ones_like(line) << (line & 63), 0)
        mask = self.layout.tree_mask
        mask.zero_().scatter_add_(2, line >> 6, bits)
        mask[:, :, 0] |= 1


def layout_of(tree: Tree | DynamicTree, batch: int, device: torch.device) -> Layout:
    """The layout of a static tree, or of dynamic ones room for it: as many roots, until a `Growth` writes it."""
    if isinstance(tree, Tree):
        return Layout(tree.depths.to(device), tree.mask_words.to(device), tree.parents.to(device))
    shape = (batch, tree.num_nodes)
    depths, parents = (torch.zeros(shape, dtype=torch.int32, device=device) for _ in range(2))
    parents[:, 0] = -1
    words = -(-tree.num_nodes // 64)
    return Layout(depths, torch.ones(*shape, words, dtype=torch.int64, device=device), parents)
