"""Tree: node order, mask, retrieve_indices, search, prune, rendering and every error. Names: test_named_trees.py."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_kernels.tree import Tree


@st.composite
def choices(draw: st.DrawFn, max_paths: int = 80) -> list[list[int]]:
    """A valid tree as choices in random order, grown one child at a time."""
    paths: list[tuple[int, ...]] = []
    for _ in range(draw(st.integers(0, max_paths))):
        parent = draw(st.sampled_from([(), *paths]))
        path = (*parent, draw(st.integers(0, 12)))
        if path not in paths:
            paths.append(path)
    return [list(path) for path in draw(st.permutations(paths))]


probability_rows = st.lists(
    st.lists(st.integers(0, 20), max_size=3).map(lambda row: [x / max(sum(row), 25) for x in row]), max_size=3
)


@settings(max_examples=60, deadline=None)
@given(choices())
def test_tensors_follow_from_the_choices(given_choices: list[list[int]]) -> None:
    tree = Tree.from_choices(given_choices)
    paths = [(), *sorted(map(tuple, given_choices), key=lambda path: (len(path), path))]
    assert tree.choices == [list(path) for path in paths[1:]]
    assert tree.num_nodes == len(paths)
    assert tree.max_depth == tree.num_heads == max(map(len, paths))
    assert tree.top_k == max((rank + 1 for path in paths for rank in path), default=1)
    assert tree.parents.tolist() == [-1, *(paths.index(path[:-1]) for path in paths[1:])]
    assert tree.depths.tolist() == [len(path) for path in paths]
    assert tree.ranks.tolist() == [-1, *(path[-1] for path in paths[1:])]

    visible = [[i <= j and row[: len(col)] == col for i, col in enumerate(paths)] for j, row in enumerate(paths)]
    assert tree.mask_words.shape == (len(paths), math.ceil(len(paths) / 64))
    bits = np.unpackbits(tree.mask_words.numpy().view(np.uint8), axis=1, bitorder="little")
    assert bits[:, : len(paths)].astype(bool).tolist() == visible
    assert not bits[:, len(paths) :].any()

    leaves = [node for node, path in enumerate(paths) if not any(p[:-1] == path for p in paths if p)]
    for row, leaf in zip(tree.retrieve_indices.tolist(), leaves, strict=True):
        line = [paths.index(paths[leaf][:depth]) for depth in range(len(paths[leaf]) + 1)]
        assert row == line + [-1] * (tree.max_depth + 1 - len(line))


@pytest.mark.parametrize("name", ["parents", "depths", "ranks", "retrieve_indices", "mask_words"])
@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_dtypes_and_devices(name: str, default: str) -> None:
    """Whatever the caller's default device is."""
    tree = Tree.named("3x2")
    with torch.device(default):
        tensor = getattr(tree, name)
    assert tensor.dtype == (torch.int64 if name == "mask_words" else torch.int32)
    assert tensor.device.type == "cpu"
    assert tensor.is_contiguous()


def test_root_alone() -> None:
    tree = Tree.from_choices([])
    assert tree == Tree.named("root")
    assert (tree.num_nodes, tree.max_depth, tree.num_heads, tree.top_k, tree.choices) == (1, 0, 0, 1, [])
    assert tree.parents.tolist() == [-1]
    assert tree.mask_words.tolist() == [[1]]
    assert tree.retrieve_indices.tolist() == [[0]]
    assert tree.render().splitlines()[-1].split() == ["0", "0", "root"]


def test_bit_63_is_the_sign_bit() -> None:
    words = Tree.named("chain-64").mask_words
    assert words.shape == (65, 2)
    assert words[63].tolist() == [-1, 0]
    assert words[64].tolist() == [-1, 1]
    assert Tree.named("chain-63").mask_words[62].tolist() == [2**63 - 1]


@pytest.mark.parametrize("num_nodes", [1, 2, 63, 64, 65, 128, 129, 255, 256])
def test_mask_at_word_boundaries(num_nodes: int) -> None:
    tree = Tree.from_choices([[rank] for rank in range(num_nodes - 1)])
    assert tree.mask_words.shape == (num_nodes, -(-num_nodes // 64))
    for node, words in enumerate(tree.mask_words.tolist()):
        line = sum((word % 2**64) << 64 * w for w, word in enumerate(words))
        assert line == 1 | 1 << node


def test_medusa_order_of_retrieve_indices() -> None:
    tree = Tree.from_choices([[0, 0], [1], [0], [0, 1], [0, 1, 0]])
    assert tree.choices == [[0], [1], [0, 0], [0, 1], [0, 1, 0]]
    assert tree.retrieve_indices.tolist() == [[0, 2, -1, -1], [0, 1, 3, -1], [0, 1, 4, 5]]


def test_choices_cannot_be_changed_from_outside() -> None:
    source = [[0], [0, 0]]
    tree = Tree.from_choices(source)
    source[0].append(7)
    tree.choices[1].append(9)
    assert tree.choices == [[0], [0, 0]]


def test_equality_hash_and_repr() -> None:
    one, two = Tree.from_choices([[0], [1]]), Tree.from_choices(((1,), (0,)))
    assert one == two
    assert len({one, two, Tree.named("chain-2")}) == 2
    assert one != [[0], [1]]
    assert repr(one) == "Tree(3 nodes, depth 1: [[0], [1]])"
    assert repr(Tree.named("chain-9")).endswith("[0, 0, 0, 0, 0, 0, 0, 0], ...])")


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("0,0", TypeError, r"choices is str '0,0'; it must be a list"),
        (None, TypeError, r"choices is NoneType"),
        ([0], TypeError, r"choices\[0\] is int 0; it must be a list of ranks"),
        (["00"], TypeError, r"choices\[0\] is str '00'"),
        ([[0], []], ValueError, r"choices\[1\] is empty; the root is not listed"),
        ([[0], [1], [0]], ValueError, r"choices\[2\] repeats \[0\] of choices\[0\]"),
        ([[0], [1, 0, 0]], ValueError, r"choices\[1\] is \[1, 0, 0\] but its parent \[1, 0\] is missing"),
        ([[0], [0, -1]], ValueError, r"choices\[1\]\[1\], a rank, is -1; it must be an integer in 0\.\."),
        ([[2**31]], ValueError, r"choices\[0\]\[0\], a rank, is 2147483648"),
        ([[0.0]], TypeError, r"choices\[0\]\[0\], a rank, is float 0.0"),
        ([[True]], TypeError, r"choices\[0\]\[0\], a rank, is bool True"),
        ([[np.array([0, 1])]], TypeError, r"choices\[0\]\[0\], a rank, is ndarray array\(\[0, 1\]\)"),
        ([["0"]], TypeError, r"choices\[0\]\[0\], a rank, is str '0'"),
        ([[i] for i in range(256)], ValueError, r"256 paths, 257 nodes with the root; the most is 256 nodes"),
    ],
)
def test_bad_choices(bad: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Tree.from_choices(bad)


def test_numpy_integers_are_ranks() -> None:
    assert Tree.from_choices([list(np.array([2]))]).choices == [[2]]


# --- search ---------------------------------------------------------------------------------------------------------


def brute_force(accuracy: list[list[float]], num_nodes: int) -> float:
    """The most expected tokens over every tree of at most `num_nodes` nodes, by trying all of them."""
    best = 1.0
    trees = {frozenset()}
    paths = [
        p
        for depth in range(1, len(accuracy) + 1)
        for p in itertools.product(*(range(len(r)) for r in accuracy[:depth]))
    ]
    for _ in range(num_nodes - 1):
        trees = {tree | {p} for tree in trees for p in paths if p not in tree and (len(p) == 1 or p[:-1] in tree)}
        for tree in trees:
            value = 1 + sum(math.prod(accuracy[d][rank] for d, rank in enumerate(p)) for p in tree)
            best = max(best, value)
    return best


@settings(max_examples=60, deadline=None)
@given(probability_rows, st.integers(1, 5))
def test_search_is_optimal(accuracy: list[list[float]], num_nodes: int) -> None:
    tree = Tree.search(accuracy, num_nodes)
    assert tree.num_nodes <= num_nodes
    assert Tree.from_choices(tree.choices) == tree
    assert tree.expected_tokens(accuracy) == pytest.approx(brute_force(accuracy, num_nodes), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(probability_rows, st.integers(1, 40))
def test_search_takes_the_most_probable_paths_in_their_order(accuracy: list[list[float]], num_nodes: int) -> None:
    def probability(path: tuple[int, ...]) -> float:
        product = 1.0
        for depth, rank in enumerate(path):
            product *= accuracy[depth][rank]
        return product

    every = [
        path
        for depth in range(1, len(accuracy) + 1)
        for path in itertools.product(*(range(len(row)) for row in accuracy[:depth]))
        if probability(path) > 0
    ]
    every.sort(key=lambda path: (-probability(path), len(path), path))
    assert Tree.search(accuracy, num_nodes) == Tree.from_choices(every[: num_nodes - 1])


def test_search_knows_that_a_later_rank_may_be_likelier() -> None:
    assert Tree.search([[0.1, 0.6, 0.0, 0.2], [0.3]], 4).choices == [[1], [3], [1, 0]]


def test_search_breaks_ties_by_length_then_value() -> None:
    assert Tree.search([[0.5, 0.5], [1.0]], 3).choices == [[0], [1]]
    assert Tree.search([[0.5, 0.5], [1.0]], 4).choices == [[0], [1], [0, 0]]


def test_search_returns_fewer_nodes_when_nothing_more_can_be_right() -> None:
    assert Tree.search([[0.5, 0.0], [0.0, 0.0], [1.0]], 64).choices == [[0]]
    assert Tree.search([[1e-200], [1e-200]], 64).choices == [[0]]  # the product underflows to 0
    assert Tree.search([], 16) == Tree.search([[0.9]], 1) == Tree.named("root")


def test_search_takes_arrays_and_tensors() -> None:
    rows = [[0.5, 0.25], [0.5, 0.25]]
    assert Tree.search(np.array(rows), 5) == Tree.search(torch.tensor(rows), 5) == Tree.search(rows, 5)


@pytest.mark.parametrize(
    ("accuracy", "error", "message"),
    [
        (0.5, TypeError, r"accuracy is float 0.5; it must be a list of rows"),
        ([0.5], TypeError, r"accuracy\[0\] is float 0.5; it must be a list of probabilities"),
        ([[0.5], [1.5]], ValueError, r"accuracy\[1\]\[0\] is 1.5; it must be a probability in \[0, 1\]"),
        ([[-0.1]], ValueError, r"accuracy\[0\]\[0\] is -0.1"),
        ([[math.nan]], ValueError, r"accuracy\[0\]\[0\] is nan"),
        ([["0.5"]], ValueError, r"accuracy\[0\]\[0\] is '0.5'"),
        ([[True]], ValueError, r"accuracy\[0\]\[0\] is True"),
        ([[0.56, 0.67]], ValueError, r"accuracy\[0\] sums to 1.23; .*not cumulative"),
    ],
)
def test_bad_accuracy(accuracy: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Tree.search(accuracy, 4)
    with pytest.raises(error, match=message):
        Tree.named("chain-2").expected_tokens(accuracy)


@pytest.mark.parametrize("num_nodes", [0, 257, -1])
def test_search_size_out_of_range(num_nodes: int) -> None:
    with pytest.raises(ValueError, match=rf"num_nodes is {num_nodes}; it must be an integer in 1\.\.256"):
        Tree.search([[0.5]], num_nodes)


@pytest.mark.parametrize("num_nodes", [True, 16.0, "16"])
def test_search_size_of_wrong_type(num_nodes: object) -> None:
    with pytest.raises(TypeError, match=r"num_nodes is"):
        Tree.search([[0.5]], num_nodes)


def test_expected_tokens() -> None:
    tree = Tree.from_choices([[0], [1], [0, 0], [0, 1]])
    assert tree.expected_tokens([[0.5, 0.2], [0.4, 0.1]]) == pytest.approx(1 + 0.5 + 0.2 + 0.2 + 0.05)
    assert tree.expected_tokens([[0.5]]) == pytest.approx(1.5)  # what the table does not list is never right
    assert tree.expected_tokens([]) == Tree.named("root").expected_tokens([[0.9]]) == 1.0


def test_expected_tokens_is_the_mean_of_simulated_steps() -> None:
    rows, tree = [[0.5, 0.3], [0.6, 0.2], [0.7]], Tree.named("2x2x1")
    random, total, steps = np.random.default_rng(0), 0, 20_000
    paths = set(map(tuple, tree.choices))
    outcomes = [random.choice(len(row) + 1, steps, p=[*row, 1 - sum(row)]) for row in rows]
    for outcome in zip(*outcomes, strict=True):
        total += 1 + sum(outcome[:depth] in paths for depth in (1, 2, 3))
    assert total / steps == pytest.approx(tree.expected_tokens(rows), abs=0.03)


# --- prune ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(choices(), st.integers(0, 5), st.integers(1, 6))
def test_prune_keeps_what_the_heads_can_fill(given_choices: list[list[int]], num_heads: int, top_k: int) -> None:
    pruned = Tree.from_choices(given_choices).prune(num_heads, top_k)
    kept = [path for path in given_choices if len(path) <= num_heads and max(path) < top_k]
    assert pruned == Tree.from_choices(kept)


def test_prune_without_limits_changes_nothing() -> None:
    tree = Tree.named("medusa-7b-16")
    assert tree.prune() == tree.prune(num_heads=99) == tree.prune(top_k=99) == tree
    assert tree.prune(num_heads=0) == Tree.named("root")


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ({"num_heads": -1}, ValueError, "num_heads is -1; it must be an integer >= 0"),
        ({"top_k": 0}, ValueError, "top_k is 0; it must be an integer >= 1"),
        ({"top_k": 1.5}, TypeError, "top_k is float 1.5"),
    ],
)
def test_bad_prune(limits: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Tree.named("chain-2").prune(**limits)


# --- render ---------------------------------------------------------------------------------------------------------


def test_render() -> None:
    assert Tree.from_choices([[0], [1], [0, 0], [0, 2], [0, 0, 0]]).render() == "\n".join(
        [
            "6 nodes (1 + 2 + 2 + 1 by depth), 3 leaves, 3 heads, top-k 3",
            "node depth  path of ranks",
            "   0     0  root",
            "   1     1  ├─ 0",
            "   3     2  │  ├─ 0,0",
            "   5     3  │  │  └─ 0,0,0",
            "   4     2  │  └─ 0,2",
            "   2     1  └─ 1",
        ]
    )


def test_render_with_labels() -> None:
    lines = Tree.named("chain-2").render(["The", " cat", " sat"]).splitlines()
    assert [line.split()[-1] for line in lines[2:]] == ["The", "cat", "sat"]
    with pytest.raises(ValueError, match="labels has 1 entries; it must have one for each of the 3 nodes"):
        Tree.named("chain-2").render(["The"])


@settings(max_examples=20, deadline=None)
@given(choices())
def test_render_shows_every_node_once(given_choices: list[list[int]]) -> None:
    tree = Tree.from_choices(given_choices)
    lines = tree.render().splitlines()[2:]
    assert sorted(int(line.split()[0]) for line in lines) == list(range(tree.num_nodes))


def test_render_of_the_deepest_tree() -> None:
    assert len(Tree.named("chain-255").render().splitlines()) == 258
