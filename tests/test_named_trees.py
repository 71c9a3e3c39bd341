"""Trees by name: chains, dense trees, and the shipped ones against what they were grown from."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from medusa_kernels import named_trees
from medusa_kernels.named_trees import ranks_from_cumulative
from medusa_kernels.tree import Tree

# The published figures are for checking only and are not part of this repository; without them these tests are skipped.
PUBLISHED = Path(os.environ.get("MEDUSA_PUBLISHED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"no published figures in {PUBLISHED}")


def published(name: str) -> dict:
    return json.loads((PUBLISHED / name).read_text())


def published_accuracy() -> dict[str, list[list[float]]]:
    return {
        model: [ranks_from_cumulative(row, 10) for row in rows]
        for model, rows in published("published_head_accuracy.json").items()
    }


@pytest.mark.parametrize("length", [1, 4, 255])
def test_chain(length: int) -> None:
    tree = Tree.named(f"chain-{length}")
    assert tree.choices == [[0] * depth for depth in range(1, length + 1)]
    assert tree.parents.tolist() == list(range(-1, length))


@pytest.mark.parametrize(("name", "num_nodes"), [("4x3x2", 41), ("1x1", 3), ("15x16", 256), ("2x2x2x2x2x2", 127)])
def test_dense(name: str, num_nodes: int) -> None:
    tree = Tree.named(name)
    widths = [int(width) for width in name.split("x")]
    every = [p for depth in range(1, len(widths) + 1) for p in itertools.product(*map(range, widths[:depth]))]
    assert tree.num_nodes == num_nodes
    assert tree == Tree.from_choices(every)


def test_every_name_resolves_to_a_tree_of_its_size() -> None:
    assert Tree.names()[0] == "root"
    assert {"medusa-7b-16", "medusa-13b-32", "medusa-33b-64"} <= set(Tree.names())
    for name in Tree.names()[1:]:
        tree = Tree.named(name)
        assert tree.num_nodes == int(name.rpartition("-")[2])
        assert Tree.from_choices(tree.choices) == tree


def test_named_trees_of_a_family_contain_one_another() -> None:
    small, large = Tree.named("medusa-7b-16"), Tree.named("medusa-7b-64")
    assert all(path in large.choices for path in small.choices)


def test_a_family_given_by_its_accuracy_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[0.5, 0.2, 0.1], [0.4, 0.2]]
    family = named_trees.GrownFrom(5, rows, None)
    monkeypatch.setattr(named_trees, "_by_name", lambda: {"ours-5": family})
    assert Tree.names() == ["root", "ours-5"]
    assert Tree.named("ours-5") == Tree.search(rows, 5)


def test_data_file_is_well_formed() -> None:
    for family, entry in json.loads(Path(named_trees.__file__).with_suffix(".json").read_text()).items():
        assert set(entry) - {"accuracy", "growth"} == {"source", "nodes"}, family
        assert ("accuracy" in entry) != ("growth" in entry), family


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("medusa-7b-17", ValueError, r"'medusa-7b-17' is no known tree; did you mean 'medusa-7b-16' or "),
        ("chain4", ValueError, r"did you mean 'chain-4'\? it must be 'chain-K', dense 'AxBxC', 'root' or one of"),
        ("", ValueError, r"name '' is no known tree; it must be"),
        ("chain-0", ValueError, r"'chain-0' asks for 0 nodes after the root; a chain has 1 to 255"),
        ("chain-256", ValueError, r"'chain-256' asks for 256 nodes"),
        ("16x16", ValueError, r"'16x16' asks for 273 nodes with the root; the most is 256"),
        ("99999x99999", ValueError, r"asks for 9999900001 nodes"),
        ("4x0", ValueError, r"'4x0' has a factor 0"),
        (16, TypeError, r"name is int 16; it must be a str such as"),
    ],
)
def test_bad_names(name: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Tree.named(name)


def test_ranks_from_cumulative() -> None:
    row = ranks_from_cumulative([0.5, 0.6, 0.68, 0.72, 0.74], 8)
    assert row[:5] == pytest.approx([0.5, 0.1, 0.08, 0.04, 0.02])
    assert row[5:] == pytest.approx([0.01, 0.005, 0.0025])
    assert sum(ranks_from_cumulative([0.2, 0.4, 0.6, 0.8, 0.95], 30)) == pytest.approx(1.0)


@pytest.mark.parametrize("cumulative", [[0.5, 0.6, 0.7, 0.8], [0.5, 0.4, 0.6, 0.7, 0.8], [0.0, 0.1, 0.2, 0.3, 0.4]])
def test_bad_cumulative(cumulative: list[float]) -> None:
    with pytest.raises(ValueError, match="must have at least 5 rising entries above 0"):
        ranks_from_cumulative(cumulative, 10)


@needs_published
@pytest.mark.parametrize("model", ["7b", "13b", "33b"])
@pytest.mark.parametrize("num_nodes", [16, 32, 64])
def test_shipped_defaults_are_the_search_over_the_published_accuracy(model: str, num_nodes: int) -> None:
    assert Tree.named(f"medusa-{model}-{num_nodes}") == Tree.search(published_accuracy()[model], num_nodes)


@needs_published
@pytest.mark.parametrize("model", ["7b", "13b", "33b"])
def test_our_tree_is_never_worse_than_a_published_one(model: str) -> None:
    accuracy = published_accuracy()[model]
    ours = Tree.named(f"medusa-{model}-64")
    for name, paths in published("published_trees.json").items():
        theirs = Tree.from_choices(paths)
        assert theirs.num_nodes == ours.num_nodes, name
        assert theirs.expected_tokens(accuracy) <= ours.expected_tokens(accuracy), name
