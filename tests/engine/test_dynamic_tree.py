"""Dynamic trees: the most probable nodes, as a search through all of them finds; the text stays plain decoding's."""

import itertools
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_engine import Medusa
from medusa_engine.dynamic_tree import DynamicTree, Growth, layout_of, tempered
from medusa_engine.heads_files import save_heads
from medusa_kernels import Tree
from tests.engine.models import FOLDER, PROMPTS, counting_folder, counting_heads_folder, fitted_heads, random_folder

CPU = torch.device("cpu")


def random_logprobs(batch: int, heads: int, top_k: int, vocab: int, seed: int, sharpness: float = 2.0) -> torch.Tensor:
    logits = sharpness * torch.randn(batch, heads, vocab, generator=torch.Generator().manual_seed(seed))
    return logits.log_softmax(-1).topk(top_k, dim=-1).values


def grow(tree: DynamicTree, logprobs: torch.Tensor) -> Growth:
    growth = Growth(tree, layout_of(tree, len(logprobs), CPU))
    growth(logprobs)
    return growth


def best_total(logprobs: torch.Tensor, count: int) -> float:
    """The sum of the `count` largest probabilities among all paths of one sequence: what no tree can exceed."""
    heads, top_k = logprobs.shape
    probabilities = logprobs.double().exp().tolist()
    products = []
    for depth in range(1, heads + 1):
        for path in itertools.product(range(top_k), repeat=depth):
            product = 1.0
            for head, rank in enumerate(path):
                product *= probabilities[head][rank]
            products.append(product)
    return sum(sorted(products, reverse=True)[:count])


def probabilities(tree: Tree, logprobs: torch.Tensor) -> list[float]:
    """Of every node but the root."""
    exact = logprobs.double().exp().tolist()
    found = []
    for path in tree.choices:
        product = 1.0
        for head, rank in enumerate(path):
            product *= exact[head][rank]
        found.append(product)
    return found


@settings(max_examples=60, deadline=None)
@given(
    num_nodes=st.integers(2, 40),
    heads=st.integers(1, 4),
    vocab=st.integers(2, 6),
    batch=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    sharpness=st.sampled_from([0.3, 2.0, 6.0]),
)
def test_the_most_probable_nodes_are_chosen(num_nodes, heads, vocab, batch, seed, sharpness):
    tree = DynamicTree.of(num_nodes, heads, vocab)
    logprobs = random_logprobs(batch, heads, tree.top_k, vocab, seed, sharpness)
    growth = grow(tree, logprobs)
    for b in range(batch):
        chosen = probabilities(tree.grown(growth.nodes[b]), logprobs[b])
        assert len(chosen) == tree.num_nodes - 1
        # A thousandth per depth is taken off, so that parents come first: that is all the choice may lose.
        assert sum(chosen) >= best_total(logprobs[b], tree.num_nodes - 1) * (1 - 2e-3 * heads)


@settings(max_examples=60, deadline=None)
@given(
    num_nodes=st.integers(2, 130),
    heads=st.integers(1, 5),
    vocab=st.integers(2, 20),
    batch=st.integers(1, 3),
    seed=st.integers(0, 10_000),
)
def test_the_layout_is_that_of_the_same_static_tree(num_nodes, heads, vocab, batch, seed):
    tree = DynamicTree.of(num_nodes, heads, vocab)
    growth = grow(tree, random_logprobs(batch, heads, tree.top_k, vocab, seed))
    for b in range(batch):
        static = tree.grown(growth.nodes[b])
        layout = layout_of(static, 1, CPU)
        for grown, expected in zip(growth.layout, layout, strict=True):
            assert torch.equal(grown[b], expected)
        assert growth.slots[b].tolist() == [(len(path) - 1) * tree.top_k + path[-1] for path in static.choices]


def test_a_second_growth_leaves_nothing_of_the_first():
    tree = DynamicTree.of(70, 4, 30)
    first, second = (random_logprobs(2, 4, tree.top_k, 30, seed, sharpness=s) for seed, s in ((1, 0.1), (2, 8.0)))
    reused = grow(tree, first)
    before = [part.clone() for part in reused.layout]
    reused(second)
    for part, old, new in zip(reused.layout, before, grow(tree, second).layout, strict=True):
        assert torch.equal(part, new)
        assert not torch.equal(part, old)


@pytest.mark.parametrize("value", [float("-inf"), float("nan"), 0.0])
def test_odd_probabilities_still_make_a_tree(value):
    """No probability at all, not a number, or certainty everywhere: parents still stand before their children."""
    tree = DynamicTree.of(24, 3, 8)
    growth = grow(tree, torch.full((1, 3, tree.top_k), value))
    assert tree.grown(growth.nodes[0]).num_nodes == 24


def test_a_small_vocabulary_bounds_the_tree():
    tree = DynamicTree.of(200, 2, 3)
    assert (tree.num_nodes, tree.top_k, tree.max_depth) == (1 + 3 + 9, 3, 2)


def test_temperature_1_changes_nothing():
    logprobs = random_logprobs(3, 4, 8, 50, seed=3)
    assert torch.allclose(tempered(logprobs, torch.ones(4)), logprobs, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.3, 3.0])
def test_tempering_is_exact_over_a_whole_vocabulary(temperature):
    logits = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(4)).sort(dim=-1, descending=True).values
    found = tempered(logits.log_softmax(-1), torch.full((3,), temperature))
    assert torch.allclose(found, (logits / temperature).log_softmax(-1), atol=1e-4)


def test_tempering_is_per_head_and_an_upper_bound_above_1():
    logits = (3 * torch.randn(1, 2, 400, generator=torch.Generator().manual_seed(5))).sort(descending=True).values
    temperatures = torch.tensor([1.0, 2.0])
    exact = (logits / temperatures[:, None]).log_softmax(-1)[..., :16]
    found = tempered(logits.log_softmax(-1)[..., :16], temperatures)
    assert torch.allclose(found[:, 0], exact[:, 0], atol=1e-4)
    assert (found[:, 1] >= exact[:, 1] - 1e-5).all()
    assert (found[:, 1] < 0).all()


def test_temperatures_move_nodes_from_sure_heads_to_others():
    """A second head that is far too sure of itself gets deep nodes; once tempered, the first head's guesses win."""
    logprobs = torch.tensor([[[0.3, 0.2, 0.15, 0.1, 0.05], [0.99, 0.002, 0.001, 0.001, 0.001]]]).log()
    sure = DynamicTree(6, 2, 5)
    honest = DynamicTree(6, 2, 5, (1.0, 6.0))
    depths = [grow(tree, logprobs).layout.depths[0].tolist() for tree in (sure, honest)]
    assert depths[0].count(2) == 2
    assert depths[1].count(2) == 1


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 0.0), (1.0, -2.0), (1.0, float("inf")), (1.0, float("nan"))])
def test_wrong_temperatures(temperatures):
    with pytest.raises(ValueError, match="temperatures must be 2 positive numbers, one per head"):
        DynamicTree.of(8, 2, 50, temperatures)


# Decoding with them


@cache
def engine(tree: str, dtype: str = "float32", backend: str = "cpu") -> Medusa:
    import transformers

    folder = FOLDER / "dynamic-fitted"
    if not folder.exists():
        model = transformers.AutoModelForCausalLM.from_pretrained(random_folder(), dtype=torch.float32)
        save_heads(folder, fitted_heads(model, PROMPTS, num_heads=4), dtype=torch.float32)
    return Medusa.from_pretrained(random_folder(), folder, backend=backend, dtype=dtype, tree=tree)


@pytest.mark.parametrize("tree", ["dynamic-2", "dynamic-9", "dynamic-66"])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", "float32"), ("cpu", "bfloat16"), ("cpu", "int8"), ("reference", "float32")]
)
def test_greedy_text_is_plain_decodings(tree, backend, dtype):
    decoder = engine(tree, dtype, backend)
    plain = decoder.generate(PROMPTS, 30, medusa=False)
    out = decoder.generate(PROMPTS, 30)
    assert out.token_ids == plain.token_ids
    assert out.stats.steps < plain.stats.steps
    alone = [decoder.generate(prompt, 30) for prompt in PROMPTS]
    assert [s.steps for s in out.stats.per_sequence] == [o.stats.steps for o in alone]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.5, "top_k": 5}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_seeded_lossless_is_seeded_plain_sampling(options, dtype):
    decoder, how = engine("dynamic-12", dtype), {"mode": "lossless", "seed": [1, 2, 3, 4], **options}
    assert (
        decoder.generate(PROMPTS, 30, **how).token_ids == decoder.generate(PROMPTS, 30, medusa=False, **how).token_ids
    )


def test_a_dynamic_tree_accepts_more_than_the_chain_of_as_many_nodes():
    """The heads know at rank 1 what they miss at rank 0: a chain stops there, the probable second guess does not."""

    def steps(tree: str) -> int:
        heads = counting_heads_folder(patchy=True)
        return (
            Medusa.from_pretrained(counting_folder(), heads, dtype="float32", tree=tree)
            .generate(["a"], 60, ignore_eos=True)
            .stats.steps
        )

    assert steps("dynamic-8") < steps("chain-4")
