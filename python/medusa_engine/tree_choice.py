"""From the `tree` option to a Tree: names, choices, node counts, and "auto"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from medusa_kernels import Tree, named_trees
from medusa_kernels.tree import MAX_NODES

from . import calibration
from .draft import Drafter, MedusaDrafter
from .dynamic_tree import DynamicTree

_DYNAMIC = re.compile(r"dynamic-([0-9]{1,9})")


def choose_tree(
    tree: str | int | Sequence[Sequence[int]] | Tree, drafter: Drafter, *, rows: int, batch: int
) -> Tree | DynamicTree:
    """The tree meant by `tree`, cut to what the drafter can fill: a chain where it has one guess a depth.

    An int is the best known tree of at most that many nodes: the paths that the heads' checkpoint lists as best, a
    search over the accuracies it lists, or else Vicuna-7B's tree. "auto" is the fastest tree that `medusa calibrate`
    found here for this batch size; where it has not measured that, `rows` are shared among the sequences. "dynamic-N"
    is the N most probable nodes of every step under the heads' own probabilities.

    Raises:
        ValueError, TypeError: no such name, or choices that are no tree.
    """
    if isinstance(tree, Tree):
        chosen = tree
    elif tree == "auto":
        chosen = _calibrated(drafter, batch) or _best(max(1, min(rows // batch, drafter.auto_nodes)), drafter)
    elif isinstance(tree, str) and (dynamic := _DYNAMIC.fullmatch(tree)):
        return _dynamic(int(dynamic[1]), drafter)
    elif isinstance(tree, str):
        chosen = Tree.named(tree)
    elif isinstance(tree, int) and not isinstance(tree, bool):
        chosen = _best(tree, drafter)
    else:
        chosen = Tree.from_choices(tree)
    return chosen.prune(drafter.num_heads, drafter.vocab_size)


def _calibrated(drafter: Drafter, batch: int) -> Tree | None:
    found = calibration.find(drafter._model, drafter) if isinstance(drafter, MedusaDrafter) else None
    return None if found is None else found.tree(batch)


def _dynamic(num_nodes: int, drafter: Drafter) -> Tree | DynamicTree:
    if not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(f"tree 'dynamic-{num_nodes}' must have between 1 and {MAX_NODES} nodes")
    if not isinstance(drafter, MedusaDrafter):
        raise ValueError(f"tree 'dynamic-{num_nodes}' needs the probabilities of Medusa heads: draft='medusa'")
    if num_nodes == 1:
        return Tree.from_choices([])
    temperatures = drafter.temperatures
    if temperatures is None and (found := calibration.find(drafter._model, drafter)) is not None:
        temperatures = found.temperatures
    return DynamicTree.of(num_nodes, drafter.num_heads, drafter.vocab_size, tuple(temperatures or ()))


def _best(num_nodes: int, drafter: Drafter) -> Tree:
    if not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(f"tree as a number of nodes must be between 1 and {MAX_NODES}, not {num_nodes}")
    if drafter.paths is None and drafter.accuracy is not None:
        return Tree.search(drafter.accuracy, num_nodes)
    paths = drafter.paths or named_trees.lookup("medusa-7b-64").growth
    usable = [path for path in paths if len(path) <= drafter.num_heads and max(path) < drafter.vocab_size]
    return Tree.from_choices(usable[: num_nodes - 1])
