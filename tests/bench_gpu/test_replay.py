"""Acceptance replayed: the published mean, by the product rule, and a step that accepts what was drawn."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import geometry, replay
from medusa_engine.draft import MedusaDrafter
from medusa_kernels import Tree
from tests.bench_gpu.tiny import tiny_model


@pytest.mark.parametrize("tokens_per_step", replay.TOKENS_PER_STEP.values())
def test_the_mean_is_the_published_one(tokens_per_step):
    tree = replay.tree_of(64)
    nodes = replay.draw(tree, tokens_per_step, (50, 2))
    assert nodes.shape == (50, 2)
    assert 1 + tree.depths[nodes].double().mean().item() == pytest.approx(tokens_per_step, abs=0.05)


def test_nodes_come_as_often_as_the_product_rule_says():
    """Two guesses deep: the share of steps that stop at a node is its product less its children's."""
    tree = Tree.named("2x1")
    first, second, *_ = replay.rescaled(tree, 2.0)
    shares = torch.bincount(replay.draw(tree, 2.0, (10000,)), minlength=tree.num_nodes) / 10000
    expected = [
        1 - first[0] - first[1],
        *(p * (1 - second[0]) for p in first[:2]),
        *(p * second[0] for p in first[:2]),
    ]
    assert shares.tolist() == pytest.approx(expected, abs=1e-3)


def test_accuracies_stay_probabilities_and_keep_their_order():
    for row in replay.rescaled(replay.tree_of(64), 3.47):
        assert all(p > 0 for p in row)
        assert sum(row) < 1


def test_a_mean_beyond_the_tree_is_refused():
    with pytest.raises(ValueError, match=r"between 1 and 3, not 3\.2"):
        replay.rescaled(Tree.named("4x2"), 3.2)


def test_a_step_accepts_what_was_drawn():
    checkpoint, model = tiny_model()
    tree = Tree.named("3x2")
    drafter = MedusaDrafter(model, geometry.random_heads(checkpoint, own_lm_heads=True))
    decoder = replay.ReplayedDecoder(model, drafter, tree, batch=2, max_seqlen=64)
    leaf = tree.num_nodes - 1
    decoder.replay(torch.tensor([[0, leaf], [1, 0]]))
    decoder.start([[1, 2], [3, 4, 5]], None)
    lengths = []
    for _ in range(3):
        decoder.step()
        lengths.append(decoder.accept_length.tolist())
    assert lengths == [[0, 2], [1, 0], [0, 2]]
    assert decoder.accepted_nodes.tolist() == [[0, -1, -1], [0, int(tree.parents[leaf]), leaf]]
    assert decoder.cache.seqlens.tolist() == [2 + 1 + 2 + 1, 3 + 3 + 1 + 3]
