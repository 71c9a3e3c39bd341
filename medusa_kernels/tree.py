"""The speculation tree: which of the heads' guesses one verification step checks, and how they hang together.

A tree is a set of paths of ranks. Path `(0, 2)` is "head 1's best guess, then head 2's third best". Node 0 is the root,
the token that the base model itself just chose; nodes are numbered by (depth, path), so a parent precedes its children.
"""

from __future__ import annotations

import heapq
import itertools
import math
import numbers
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np
import torch

from medusa_kernels import named_trees

MAX_NODES = 256
"""Largest tree, root included: four mask words."""

_WORD_BITS = 64
_MAX_RANK = 2**31 - 1
_SUM_SLACK = 1e-6
_CHAIN = re.compile(r"chain-([0-9]{1,9})")
_DENSE = re.compile(r"[0-9]{1,9}(?:x[0-9]{1,9})+")

Path = tuple[int, ...]


class Tree:
    """An immutable speculation tree. Build one with `from_choices`, `search` or `named`.

    The tensors are built on first use, live on the CPU and are shared by every reader: treat them as read-only. Two
    trees are equal, and hash alike, exactly when they have the same paths.
    """

    def __init__(self, paths: tuple[Path, ...]) -> None:
        """Take paths that are already checked and sorted by (length, value); `from_choices` does both."""
        self._paths = paths

    @classmethod
    def from_choices(cls, choices: Sequence[Sequence[int]]) -> Tree:
        """Build the tree of the given paths of ranks, in any order; the root is not listed and `[]` is the root alone.

        Raises TypeError if `choices` or a path is no list or tuple or a rank is no integer, and ValueError for an empty
        path, a rank < 0, a duplicate, a path whose parent is absent, or more than 256 nodes with the root.
        """
        if not isinstance(choices, (list, tuple)):
            shown = " ".join(repr(choices).split())  # an array's takes several lines
            raise TypeError(f"choices is {type(choices).__name__} {shown:.60}; it must be a list of lists of ranks")
        if len(choices) >= MAX_NODES:
            count = f"{len(choices)} paths, {len(choices) + 1} nodes with the root"
            raise ValueError(f"choices has {count}; the most is {MAX_NODES} nodes")
        first_at: dict[Path, int] = {}
        for index, choice in enumerate(choices):
            path = _check_path(choice, f"choices[{index}]")
            if path in first_at:
                raise ValueError(
                    f"choices[{index}] repeats {list(path)} of choices[{first_at[path]}]; paths must be unique"
                )
            first_at[path] = index
        for path, index in first_at.items():
            if len(path) > 1 and path[:-1] not in first_at:
                raise ValueError(
                    f"choices[{index}] is {list(path)} but its parent {list(path[:-1])} is missing; "
                    "every prefix of a path must be listed"
                )
        return cls(tuple(sorted(first_at, key=lambda path: (len(path), path))))

    @classmethod
    def search(cls, accuracy: Sequence[Sequence[float]], num_nodes: int) -> Tree:
        """The tree of `num_nodes` nodes, root counted, with the most expected tokens per step under `accuracy`.

        `accuracy[head][rank]` is the probability that exactly that rank of that head is right (not cumulative). Rows
        may differ in length. Under the product rule behind Medusa's sparse trees (arXiv 2401.10774) a node is right
        with the product of the entries along its path. A product never exceeds its parent's, so the `num_nodes - 1`
        most probable paths always form a tree, and no tree of that size expects more. Equal probabilities: the shorter
        path first, then the lexicographically smaller. A larger tree therefore contains every smaller one.

        A node that cannot be right is never added: with fewer than `num_nodes` nodes of positive probability the tree
        is smaller than asked.

        Raises TypeError or ValueError for values outside [0, 1], a row that sums to more than 1 + 1e-6, or `num_nodes`
        outside 1..256.
        """
        rows = _check_accuracy(accuracy)
        num_nodes = _check_int(num_nodes, "num_nodes", 1, MAX_NODES)
        paths = itertools.islice(_most_probable_paths(rows), num_nodes - 1)
        return cls(tuple(sorted(paths, key=lambda path: (len(path), path))))

    @classmethod
    def named(cls, name: str) -> Tree:
        """The tree called `name`: one of `names()`, or of the two patterns

        - `chain-K`, K in 1..255: K nodes after the root, each the best guess of the next head;
        - `AxBxC`, two factors or more: dense, each of the A best guesses, then each of the next head's B best, ...

        Raises ValueError for an unknown name, listing the closest known ones, and for a pattern of more than 256 nodes.
        """
        if not isinstance(name, str):
            raise TypeError(
                f"name is {type(name).__name__} {name!r:.60}; it must be a str such as 'chain-4' or '4x3x2'"
            )
        if name == "root":
            return cls(())
        if chain := _CHAIN.fullmatch(name):
            length = int(chain[1])
            if not 1 <= length < MAX_NODES:
                raise ValueError(
                    f"name {name!r} asks for {length} nodes after the root; a chain has 1 to {MAX_NODES - 1}"
                )
            return cls(tuple((0,) * depth for depth in range(1, length + 1)))
        if _DENSE.fullmatch(name):
            return cls(_dense_paths(name))
        grown_from = named_trees.lookup(name)
        if grown_from.accuracy is not None:
            return cls.search(grown_from.accuracy, grown_from.num_nodes)
        return cls.from_choices(grown_from.growth[: grown_from.num_nodes - 1])

    @staticmethod
    def names() -> list[str]:
        """Every name that `named` knows besides the patterns `chain-K` and `AxBxC`. A name ends in its node count."""
        return ["root", *named_trees.names()]

    @property
    def choices(self) -> list[list[int]]:
        """The paths, sorted by (length, value): node i + 1 is `choices[i]`. A fresh copy at each call."""
        return [list(path) for path in self._paths]

    @property
    def num_nodes(self) -> int:
        """Nodes, root counted."""
        return len(self._paths) + 1

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node; the root's is 0."""
        return len(self._paths[-1]) if self._paths else 0

    @property
    def num_heads(self) -> int:
        """Heads the tree reads: one per depth."""
        return self.max_depth

    @cached_property
    def top_k(self) -> int:
        """Guesses the tree reads of each head: its largest rank + 1, and for the root alone 1, a valid top_k."""
        return max((path[-1] + 1 for path in self._paths), default=1)

    @cached_property
    def _parent_ids(self) -> list[int]:
        ids = {path: node for node, path in enumerate(self._paths, start=1)}
        return [-1, *(ids[path[:-1]] if len(path) > 1 else 0 for path in self._paths)]

    @cached_property
    def parents(self) -> torch.Tensor:
        """int32 (n,): each node's parent, -1 for the root."""
        return _on_host(self._parent_ids)

    @cached_property
    def depths(self) -> torch.Tensor:
        """int32 (n,): each node's distance from the root. A node's position is the cache length + its depth."""
        return _on_host([0, *map(len, self._paths)])

    @cached_property
    def ranks(self) -> torch.Tensor:
        """int32 (n,): which guess of head `depth` stands at each node, -1 for the root."""
        return _on_host([-1, *(path[-1] for path in self._paths)])

    @cached_property
    def mask_words(self) -> torch.Tensor:
        """int64 (n, ceil(n / 64)): bit j of word w of row i is set iff node 64 w + j is node i or an ancestor of it.

        Bits >= n are zero. Bit 63 is the int64's sign, so a word may be negative.
        """
        lines: list[int] = []
        for node, parent in enumerate(self._parent_ids):
            lines.append((lines[parent] if node else 0) | 1 << node)
        words = -(-self.num_nodes // _WORD_BITS)
        raw = b"".join(line.to_bytes(words * _WORD_BITS // 8, "little") for line in lines)
        return torch.from_numpy(np.frombuffer(raw, dtype="<i8").reshape(-1, words).astype(np.int64))

    @cached_property
    def retrieve_indices(self) -> torch.Tensor:
        """int32 (leaves, max_depth + 1): node ids from the root to each leaf, rows by ascending leaf id, -1 padded.

        The padding is -1 and not 0 because 0 is a real node: Medusa's own 0 lets a padded column accept a token.
        """
        leaves = [node for node, children in enumerate(self.children) if not children]
        rows = []
        for leaf in leaves:
            line = [leaf]
            while line[-1]:
                line.append(self._parent_ids[line[-1]])
            rows.append(line[::-1] + [-1] * (self.max_depth + 1 - len(line)))
        return _on_host(rows)

    @cached_property
    def children(self) -> list[list[int]]:
        """Of each node, the nodes whose parent it is, in their order."""
        children: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for node, parent in enumerate(self._parent_ids[1:], start=1):
            children[parent].append(node)
        return children

    def expected_tokens(self, accuracy: Sequence[Sequence[float]]) -> float:
        """Tokens that one step is expected to emit: 1 + the sum over all nodes but the root of P(node is accepted).

        P(node) is the product of `accuracy[depth - 1][rank]` along its path. Siblings exclude each other, so the sum is
        the expected accept_length; the 1 is the token that the base model itself adds at every step (a step emits
        accept_length + 1). A head or rank that `accuracy` does not list counts as never right. Same errors as `search`.
        """
        rows = _check_accuracy(accuracy)
        probability = {(): 1.0}
        for path in self._paths:
            row = rows[len(path) - 1] if len(path) <= len(rows) else ()
            probability[path] = probability[path[:-1]] * (row[path[-1]] if path[-1] < len(row) else 0.0)
        return math.fsum(probability.values())

    def prune(self, num_heads: int | None = None, top_k: int | None = None) -> Tree:
        """The part of the tree that `num_heads` heads with `top_k` guesses each can fill (None: no limit).

        Drops nodes deeper than `num_heads` and nodes with a rank >= `top_k`, and what hangs below them.
        Raises TypeError or ValueError unless `num_heads` is an integer >= 0 and `top_k` one >= 1.
        """
        heads = self.max_depth if num_heads is None else _check_int(num_heads, "num_heads", 0)
        ranks = self.top_k if top_k is None else _check_int(top_k, "top_k", 1)
        return Tree(tuple(path for path in self._paths if len(path) <= heads and max(path) < ranks))

    def render(self, labels: Sequence[str] | None = None) -> str:
        """The tree as text for a terminal: one line per node with its id, depth and path, drawn below its parent.

        `labels`, one per node in id order, stand behind the paths. Raises ValueError for another number of labels.
        """
        if labels is not None and len(labels) != self.num_nodes:
            raise ValueError(
                f"labels has {len(labels)} entries; it must have one for each of the {self.num_nodes} nodes"
            )
        per_depth = " + ".join(str(count) for count in torch.bincount(self.depths).tolist())
        lines = [
            f"{self.num_nodes} nodes ({per_depth} by depth), {len(self.retrieve_indices)} leaves, "
            f"{self.num_heads} heads, top-k {self.top_k}",
            "node depth  path of ranks",
        ]
        for node, branch in self._drawn_nodes():
            path = self._paths[node - 1] if node else ()
            text = f"{node:4d} {len(path):5d}  {branch}{','.join(map(str, path)) or 'root'}"
            lines.append(f"{text}  {labels[node]}" if labels is not None else text)
        return "\n".join(lines)

    def _drawn_nodes(self) -> Iterator[tuple[int, str]]:
        """Every node, depth first, with the box-drawing characters that stand left of it."""
        stack = [(0, "", "")]
        while stack:
            node, branch, indent = stack.pop()
            yield node, branch
            for child in reversed(self.children[node]):
                last = child == self.children[node][-1]
                stack.append((child, indent + ("└─ " if last else "├─ "), indent + ("   " if last else "│  ")))

    def __eq__(self, other: object) -> bool:
        return self._paths == other._paths if isinstance(other, Tree) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._paths)

    def __repr__(self) -> str:
        shown = ", ".join(str(list(path)) for path in self._paths[:8])
        return (
            f"Tree({self.num_nodes} nodes, depth {self.max_depth}: [{shown}{', ...' if len(self._paths) > 8 else ''}])"
        )


def _most_probable_paths(rows: list[list[float]]) -> Iterator[Path]:
    """All paths of positive probability by falling probability, then length, then value.

    Each path is queued by the one path that must come before it: its next more probable sibling, or its parent if it is
    the most probable child. So the heap grows by at most one per path, however long the rows.
    """
    ordered = [sorted(((p, rank) for rank, p in enumerate(row) if p > 0), key=lambda e: (-e[0], e[1])) for row in rows]
    heap: list[tuple[float, int, Path, float, int]] = []

    def push(parent: Path, parent_probability: float, position: int) -> None:
        depth = len(parent)
        if depth < len(ordered) and position < len(ordered[depth]):
            p, rank = ordered[depth][position]
            if parent_probability * p > 0:
                path = (*parent, rank)
                heapq.heappush(heap, (-parent_probability * p, len(path), path, parent_probability, position))

    push((), 1.0, 0)
    while heap:
        negated, _, path, parent_probability, position = heapq.heappop(heap)
        yield path
        push(path[:-1], parent_probability, position + 1)
        push(path, -negated, 0)


def _on_host(values: list) -> torch.Tensor:
    """int32, on the CPU whatever the caller's default device."""
    return torch.tensor(values, dtype=torch.int32, device="cpu")


def deepest(parents: Sequence[int]) -> int:
    """The depth of a tree's deepest node; a parent that is no earlier node stands for the root's."""
    depths: list[int] = []
    for node, parent in enumerate(parents):
        depths.append(depths[parent] + 1 if 0 <= parent < node else 0)
    return max(depths)


def _dense_paths(name: str) -> tuple[Path, ...]:
    widths = [int(width) for width in name.split("x")]
    if 0 in widths:
        raise ValueError(f"name {name!r} has a factor 0; every factor of a dense tree must be at least 1")
    count = 1 + sum(itertools.accumulate(widths, operator.mul))
    if count > MAX_NODES:
        raise ValueError(f"name {name!r} asks for {count} nodes with the root; the most is {MAX_NODES}")
    return tuple(path for depth in range(1, len(widths) + 1) for path in itertools.product(*map(range, widths[:depth])))


def _check_path(path: Sequence[int], where: str) -> Path:
    if not isinstance(path, (list, tuple)):
        raise TypeError(f"{where} is {type(path).__name__} {path!r:.60}; it must be a list of ranks")
    if not path:
        raise ValueError(f"{where} is empty; the root is not listed and every path must have at least one rank")
    return tuple(_check_int(rank, f"{where}[{i}], a rank,", 0, _MAX_RANK) for i, rank in enumerate(path))


def _check_int(value: int, name: str, low: int, high: int | None = None) -> int:
    wanted = f"an integer >= {low}" if high is None else f"an integer in {low}..{high}"
    try:
        number = operator.index(None if isinstance(value, bool) else value)
    except TypeError:  # also an array's, which has __index__ and cannot use it
        shown = " ".join(repr(value).split())
        raise TypeError(f"{name} is {type(value).__name__} {shown:.60}; it must be {wanted}") from None
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name} is {number}; it must be {wanted}")
    return number


def _check_accuracy(accuracy: Sequence[Sequence[float]]) -> list[list[float]]:
    """`accuracy` (nested sequences, a NumPy array or a tensor) as lists of floats, or an error that names the entry."""
    rows = _as_list(accuracy, "accuracy", "a list of rows, one per head")
    checked: list[list[float]] = []
    for head, row in enumerate(rows):
        values = _as_list(row, f"accuracy[{head}]", "a list of probabilities, one per rank")
        for rank, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 1:
                raise ValueError(f"accuracy[{head}][{rank}] is {value!r:.60}; it must be a probability in [0, 1]")
        checked.append([float(value) for value in values])
        if (total := math.fsum(checked[-1])) > 1 + _SUM_SLACK:
            raise ValueError(
                f"accuracy[{head}] sums to {total:.6g}; the ranks exclude each other, so it must be at most 1 "
                "(per rank, not cumulative)"
            )
    return checked


def _as_list(value: Iterable, name: str, wanted: str) -> list:
    if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim:
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return list(value)
    raise TypeError(f"{name} is {type(value).__name__} {value!r:.60}; it must be {wanted}")
