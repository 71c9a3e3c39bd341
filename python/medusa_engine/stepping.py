"""Trees from measured ranks: which paths the heads get right together, met in the steps that a tree itself takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor

Path = tuple[int, ...]


def best_paths(ranks: Iterable[Tensor], most: int, *, absent: int, rounds: int = 3) -> list[Path]:
    """The `most` paths worth most, best first: the first n - 1 of them are the best static tree of n nodes.

    A path's worth is how often all its ranks were right at once, counted where decoding stops: long acceptances skip
    the easy positions, so the stops depend on the tree, which is found by a few rounds of both.

    Args:
        ranks: per conversation int (heads, positions), the rank of the right token among each head's guesses.
        absent: the rank that stands for "not among the guesses".
    """
    rows = [[tuple(column) for column in r.T.tolist()] for r in ranks]
    stops = [range(len(columns)) for columns in rows]
    paths: list[Path] = []
    for _ in range(rounds):
        worth: Counter[Path] = Counter()
        for columns, visited in zip(rows, stops, strict=True):
            for position in visited:
                right = columns[position]
                for depth in range(1, len(right) + 1):
                    if right[depth - 1] >= absent:
                        break
                    worth[right[:depth]] += 1
        # A prefix is right at least as often as what follows it, and shorter: this order never parts them.
        paths = sorted(worth, key=lambda path: (-worth[path], len(path), path))[:most]
        stops = [list(_stops(columns, frozenset(paths))) for columns in rows]
    return paths


def tokens_per_step(ranks: Iterable[Tensor], paths: Sequence[Path]) -> float:
    """Tokens per step of simulated decoding with the tree of these paths, over conversations' ranks as above."""
    tree = frozenset(tuple(path) for path in paths)
    positions = steps = 0
    for r in ranks:
        columns = [tuple(column) for column in r.T.tolist()]
        positions += len(columns)
        steps += sum(1 for _ in _stops(columns, tree))
    return positions / max(1, steps)


def _stops(columns: list[Path], tree: frozenset[Path]) -> Iterable[int]:
    position = 0
    while position < len(columns):
        yield position
        depth = 0
        while depth < len(columns[position]) and columns[position][: depth + 1] in tree:
            depth += 1
        position += depth + 1
