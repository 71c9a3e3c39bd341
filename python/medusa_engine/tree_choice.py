"""From the `tree` option to a Tree: names, choices, node counts, and "auto"."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medusa_kernels import Tree, named_trees
from medusa_kernels.tree import MAX_NODES

from .draft import MedusaDrafter

# Nodes that cost little beside the weights' own traffic, per sequence: a CPU core's arithmetic hides under about 6
# rows, a GPU's under about 64.
AUTO_NODES = {"cpu": 6, "cuda": 64}


def choose_tree(
    tree: str | int | Sequence[Sequence[int]] | Tree, drafter: MedusaDrafter, *, device: torch.device, batch: int
) -> Tree:
    """The tree meant by `tree`, cut to what the heads can fill.

    An int is the best known tree of at most that many nodes: the paths that the heads' checkpoint lists as best, a
    search
    over the accuracies it lists, or else Vicuna-7B's tree. "auto" shares a fixed number of rows among the sequences.

    Raises:
        ValueError, TypeError: no such name, or choices that are no tree.
    """
    if isinstance(tree, Tree):
        chosen = tree
    elif tree == "auto":
        chosen = _best(max(1, AUTO_NODES[device.type] // batch), drafter)
    elif isinstance(tree, str):
        chosen = Tree.named(tree)
    elif isinstance(tree, int) and not isinstance(tree, bool):
        chosen = _best(tree, drafter)
    else:
        chosen = Tree.from_choices(tree)
    return chosen.prune(drafter.num_heads, drafter.vocab_size)


def _best(num_nodes: int, drafter: MedusaDrafter) -> Tree:
    if not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(f"tree as a number of nodes must be between 1 and {MAX_NODES}, not {num_nodes}")
    if drafter.paths is None and drafter.accuracy is not None:
        return Tree.search(drafter.accuracy, num_nodes)
    paths = drafter.paths or named_trees.lookup("medusa-7b-64").growth
    usable = [path for path in paths if len(path) <= drafter.num_heads and max(path) < drafter.vocab_size]
    return Tree.from_choices(usable[: num_nodes - 1])
