"""The named default trees: data in `named_trees.json`, read on first use.

Each entry of the file is a family of trees, one per node count listed (the root counted), called `<family>-<nodes>`:

    "smollm2": {"source": "where it was measured", "nodes": [16, 32, 64], "accuracy": [[...], ...]}

with one of two things to grow the trees from:

- `accuracy[head][rank]`, the measured probability that exactly that rank is right: `Tree.search` runs on it;
- `growth`, the paths in the order in which such a search adds them: the first n - 1 are the tree of n nodes.

Adding a family is an edit of that file alone.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple


class GrownFrom(NamedTuple):
    """What a named tree is made from: its size, and exactly one of `accuracy` and `growth`."""

    num_nodes: int
    accuracy: list[list[float]] | None
    growth: list[list[int]] | None


@cache
def _families() -> dict[str, dict]:
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


@cache
def _by_name() -> dict[str, GrownFrom]:
    return {
        f"{family}-{num_nodes}": GrownFrom(num_nodes, entry.get("accuracy"), entry.get("growth"))
        for family, entry in _families().items()
        for num_nodes in entry["nodes"]
    }


def names() -> list[str]:
    """The names of all trees in the file, by family and size."""
    return list(_by_name())


def lookup(name: str) -> GrownFrom:
    """What the tree `name` is grown from. Raises ValueError, listing close names, if the file has no such tree."""
    if found := _by_name().get(name):
        return found
    close = difflib.get_close_matches(name, ["root", "chain-4", "4x3x2", *names()], n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    known = f"'chain-K', dense 'AxBxC', 'root' or one of: {', '.join(names())}"
    raise ValueError(f"name {name!r} is no known tree; {hint}it must be {known}")


def ranks_from_cumulative(cumulative: Sequence[float], num_ranks: int) -> list[float]:
    """One head's probability per rank from its cumulative top-1, top-2, ... accuracy, at least five of them.

    Published tables end at top-5 while published trees reach rank 10. The ranks beyond the table continue it as a
    geometric series whose ratio is fitted to the ends of those last three ranks: sqrt(p[-1] / p[-3]), at most 1. It
    is our own rule, the simplest that stays positive and never rises; a row that would then exceed 1 in total is cut
    off there.
    The result has `num_ranks` entries, or as many as `cumulative` if that is longer. Raises ValueError for fewer than
    five entries or entries that do not rise.
    """
    if len(cumulative) < 5 or any(after <= before for before, after in itertools.pairwise([0.0, *cumulative])):
        raise ValueError(f"cumulative is {list(cumulative)!r:.90}; it must have at least 5 rising entries above 0")
    row = [cumulative[0], *(after - before for before, after in itertools.pairwise(cumulative))]
    ratio = min((row[-1] / row[-3]) ** 0.5, 1.0)
    while len(row) < num_ranks:
        row.append(min(row[-1] * ratio, max(1.0 - sum(row), 0.0)))
    return row
