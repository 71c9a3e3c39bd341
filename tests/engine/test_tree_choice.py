"""From the `tree` option to a tree that the heads can fill."""

from functools import cache

import pytest
import torch

from medusa_engine import Medusa
from medusa_engine.engine import DEFAULT_HEADS
from medusa_engine.heads_files import load_heads, save_heads
from medusa_engine.machine import cheap_rows
from medusa_engine.tree_choice import choose_tree
from medusa_kernels import Tree, named_trees
from medusa_kernels._backends import _C
from tests.engine.models import FOLDER, SPOKEN, counting_folder, counting_heads

CPU = torch.device("cpu")
ACCURACY = [[0.5, 0.2, 0.1], [0.4, 0.1, 0.05], [0.2, 0.1]]
PATHS = [[0], [0, 0], [1], [0, 0, 0], [1, 0], [0, 1], [2], [2, 0], [0, 0, 1], [1, 0, 0], [3]]


class Drafter:
    """What `choose_tree` asks of a drafter."""

    auto_nodes = 256

    def __init__(self, num_heads: int = 4, vocab_size: int = 100, accuracy=None, paths=None):
        self.num_heads, self.vocab_size, self.accuracy, self.paths = num_heads, vocab_size, accuracy, paths


def choose(tree, drafter: Drafter | None = None, batch: int = 1, rows: int = 6) -> Tree:
    return choose_tree(tree, drafter or Drafter(), rows=rows, batch=batch)


def test_a_tree_a_name_and_choices_mean_the_same():
    tree = Tree.named("3x2")
    assert choose(tree) == choose("3x2") == choose(tree.choices) == tree
    assert choose([]) == choose("root") == choose(1) == Tree.from_choices([])


@pytest.mark.parametrize("nodes", [1, 2, 5, 10, 12, 256])
def test_a_number_takes_the_heads_best_paths(nodes):
    tree = choose(nodes, Drafter(paths=PATHS, accuracy=ACCURACY))
    assert tree == Tree.from_choices(PATHS[: nodes - 1])
    assert tree.num_nodes == min(nodes, len(PATHS) + 1)


@pytest.mark.parametrize("nodes", [1, 2, 7, 20])
def test_a_number_searches_the_heads_accuracy(nodes):
    assert choose(nodes, Drafter(accuracy=ACCURACY)) == Tree.search(ACCURACY, nodes)


@pytest.mark.parametrize("nodes", [16, 32, 64])
def test_a_number_without_measurements_is_vicunas_tree(nodes):
    assert choose(nodes) == Tree.named(f"medusa-7b-{nodes}")


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5])
@pytest.mark.parametrize("nodes", [4, 10, 30])
def test_fewer_heads_spend_the_nodes_on_what_they_can_fill(num_heads, nodes):
    """The paths of too many heads are passed over, not cut off the tree: there are nodes left for others."""
    growth = [p for p in named_trees.lookup("medusa-7b-64").growth if len(p) <= num_heads]
    tree = choose(nodes, Drafter(num_heads))
    assert tree.max_depth <= num_heads
    assert tree.num_nodes == min(nodes, len(growth) + 1)
    assert tree == Tree.from_choices(growth[: nodes - 1])


@pytest.mark.parametrize(
    "tree", ["chain-9", "6x3x2x1", [[0], [1], [9], [0, 0], [9, 0], [0, 0, 0]], Tree.named("2x2x2x2x2")]
)
def test_what_the_heads_cannot_fill_is_pruned(tree):
    chosen = choose(tree, Drafter(num_heads=2, vocab_size=5))
    assert chosen.max_depth <= 2
    assert chosen.top_k <= 5
    asked = tree if isinstance(tree, Tree) else Tree.named(tree) if isinstance(tree, str) else Tree.from_choices(tree)
    assert chosen.choices == [c for c in asked.choices if len(c) <= 2 and max(c) < 5]


def test_rows_that_cost_little():
    assert cheap_rows(torch.device("cuda")) == 64


@pytest.mark.skipif(_C is None, reason="without the compiled module there is no instruction set to force")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_rows_that_cost_little_follow_the_instruction_set(isa):
    try:
        _C.cpu.force_isa(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    try:
        assert cheap_rows(CPU) == {"avx512": 6, "avx2": 4, "portable": 4}[isa]
    finally:
        _C.cpu.force_isa("auto")


@pytest.mark.parametrize("rows", [2, 6, 64])
def test_auto_shares_its_rows_among_the_sequences(rows):
    drafter = Drafter(num_heads=5, accuracy=ACCURACY)
    sizes = [choose("auto", drafter, batch, rows).num_nodes for batch in range(1, 2 * rows + 2)]
    assert sizes[0] == min(rows, Tree.search(ACCURACY, rows).num_nodes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[rows - 1 :] == [1] * (rows + 2)  # the root alone: plain decoding
    assert all(size * batch <= max(rows, batch) for batch, size in enumerate(sizes, start=1))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (0, "between 1 and 256, not 0"),
        (-1, "between 1 and 256, not -1"),
        (257, "between 1 and 256, not 257"),
        ("chain-x", "no known tree"),
        ("medusa-7b-17", "did you mean 'medusa-7b-16'"),
        ([[0, 0]], "its parent"),
        (True, "choices is bool True"),
        (1.5, "choices is float"),
        ([["a"]], "choices"),
    ],
)
def test_mistakes(tree, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        choose(tree)
    assert "\n" not in str(caught.value)


@cache
def measured_heads():
    folder = FOLDER / "heads-with-accuracy"
    save_heads(folder, counting_heads(4), {"accuracy": ACCURACY, "paths": PATHS}, dtype=torch.float32)
    return folder


def test_the_engine_chooses_per_batch():
    engine = Medusa.from_pretrained(counting_folder(), measured_heads(), dtype="float32")
    assert [engine.tree(b).num_nodes for b in (1, 2, 4, 8, 9)] == [6, 3, 1, 1, 1]
    assert engine.tree(1) == Tree.from_choices(PATHS[:5])
    assert engine.tree(1, medusa=False).num_nodes == 1
    one, many = engine.generate("a", 30), engine.generate(["a"] * 9, 30)
    assert one.stats.tokens_per_step > 3
    assert many.stats.tokens_per_step == 1.0
    assert many.token_ids == [one.token_ids] * 9


@pytest.mark.parametrize(
    "tree", ["chain-2", 5, 11, [[0], [1]], Tree.named("2x2"), "medusa-7b-64", "chain-30", "root"], ids=str
)
def test_every_kind_of_tree_decodes_the_same_text(tree):
    engine = Medusa.from_pretrained(counting_folder(), measured_heads(), dtype="float32", tree=tree)
    out = engine.generate("a", 62)
    assert out.token_ids == [(2 + i) % len(SPOKEN) for i in range(62)]
    assert out.stats.tokens_per_step == pytest.approx(engine.tree(1).max_depth + 1, rel=0.1)
    assert engine.tree(1).max_depth <= 4


def test_named_smollm2_trees_are_those_of_the_shipped_heads():
    paths = load_heads(DEFAULT_HEADS).metadata["paths"]
    for nodes in (16, 32, 64):
        assert Tree.named(f"smollm2-{nodes}") == Tree.from_choices(paths[: nodes - 1])
