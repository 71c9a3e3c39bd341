"""The reference is the definition every backend is held to; here it is held to definitions that share no code with
it."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

import medusa_kernels as mk
from medusa_kernels import Tree
from medusa_kernels.reference import sampling
from medusa_kernels.reference.tree_attention import unpack_mask

from . import cases, oracles
from .tolerances import GAP, assert_close, assert_ranked

seeds = st.integers(0, 2**32 - 1)
words64 = st.integers(0, 2**64 - 1)


@st.composite
def trees(draw, most: int = 24) -> Tree:
    return cases.random_tree(draw(st.integers(1, most)), torch.Generator().manual_seed(draw(seeds)))


def g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Tree attention


@given(trees(most=140))
def test_mask_words_are_the_ancestors(tree):
    visible = oracles.ancestors(tree.parents.tolist())
    assert torch.equal(unpack_mask(tree.mask_words, tree.num_nodes), visible)
    assert torch.equal(oracles.words(visible), tree.mask_words)


@given(
    trees(),
    seeds,
    st.sampled_from([(1, 1), (2, 1), (3, 3), (6, 2)]),
    st.integers(1, 40),
    st.lists(st.integers(0, 30), min_size=1, max_size=3),
)
def test_attention_equals_sdpa_with_a_dense_mask(tree, seed, heads, head_dim, prefixes):
    n, batch = tree.num_nodes, len(prefixes)
    q = torch.randn(batch, n, heads[0], head_dim, generator=g(seed))
    k, v = torch.randn(2, batch, max(prefixes) + n, heads[1], head_dim, generator=g(seed + 1))
    lengths = torch.tensor(prefixes, dtype=torch.int32)
    visible = oracles.ancestors(tree.parents.tolist()).expand(batch, n, n)
    exact, plain = (
        oracles.tree_attention(q, k, v, lengths, visible, None, dtype) for dtype in (torch.float64, torch.float32)
    )
    assert_close(mk.tree_attention(q, k, v, lengths, tree.mask_words, backend="reference"), exact, plain)


@given(st.integers(1, 70), st.integers(0, 20), seeds)
def test_a_chain_is_a_causal_block(n, prefix, seed):
    q, k, v = torch.randn(3, 1, prefix + n, 2, 8, generator=g(seed))
    chain = Tree.from_choices([[0] * depth for depth in range(1, n)])
    out = mk.tree_attention(
        q[:, prefix:], k, v, torch.tensor([prefix], dtype=torch.int32), chain.mask_words, backend="reference"
    )
    causal = F.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (q, k, v)), is_causal=True)
    assert_close(out, causal.transpose(1, 2)[:, prefix:], out)


@given(trees(), seeds)
def test_a_node_equals_chain_decoding_of_its_own_path(tree, seed):
    """What makes tree verification legitimate: compact the cache to one path, and its nodes see what a chain would."""
    n, prefix = tree.num_nodes, 7
    q = torch.randn(1, n, 2, 8, generator=g(seed))
    cache = torch.randn(1, 2, 1, prefix + n, 1, 8, generator=g(seed + 1))
    lengths = torch.tensor([prefix], dtype=torch.int32)
    whole = mk.tree_attention(q, *cache[0], lengths, tree.mask_words, backend="reference")
    for row in tree.retrieve_indices:
        path = row[row >= 0]
        compacted = cache.clone()
        count = torch.tensor([len(path) - 1], dtype=torch.int32)
        mk.compact_kv(compacted, path[None].contiguous(), count, lengths, backend="reference")
        chain = Tree.from_choices([[0] * depth for depth in range(1, len(path))]).mask_words
        alone = mk.tree_attention(q[:, path.long()], *compacted[0], lengths, chain, backend="reference")
        assert_close(alone, whole[:, path.long()].double(), whole[:, path.long()])


# compact_kv, rms_norm, rotary_append


@given(st.integers(1, 3), st.lists(st.sets(st.integers(1, 11), max_size=6), min_size=1, max_size=4), seeds)
def test_compact_kv_is_a_gather(layers, paths, seed):
    batch, width = len(paths), max(map(len, paths)) + 1
    accepted = torch.full((batch, width), -1, dtype=torch.int32)
    for b, path in enumerate(paths):
        accepted[b, : len(path) + 1] = torch.tensor([0, *sorted(path)], dtype=torch.int32)
    lengths = torch.randint(0, 5, (batch,), generator=g(seed), dtype=torch.int32)
    cache = torch.randn(layers, 2, batch, 17, 2, 3, generator=g(seed))
    count = (accepted >= 0).sum(1).int() - 1
    rows = torch.arange(17).expand(batch, 17).clone()
    for b, path in enumerate(paths):
        start = int(lengths[b])
        rows[b, start : start + len(path) + 1] = start + accepted[b, : len(path) + 1].long()
    expected = cache.gather(3, rows[None, None, :, :, None, None].expand_as(cache))
    mk.compact_kv(cache, accepted, count, lengths, backend="reference")
    assert torch.equal(cache, expected)


@given(st.integers(1, 5), st.integers(1, 100), st.floats(1e-8, 1.0), seeds)
def test_rms_norm_gives_rows_of_mean_square_one(rows, hidden, eps, seed):
    x = torch.randn(rows, hidden, generator=g(seed))
    out = mk.rms_norm(x, torch.ones(hidden), eps, backend="reference").double()
    mean = x.double().pow(2).mean(-1)
    assert torch.allclose(out.pow(2).mean(-1), mean / (mean + eps), rtol=1e-5)


@given(st.integers(1, 32), st.integers(0, 500), st.integers(0, 500), st.integers(0, 200), seeds)
def test_rotation_keeps_lengths_and_sees_only_distance(half, first, second, shift, seed):
    angles = torch.outer(torch.arange(800).double(), 50.0 ** (-torch.arange(half).double() / half))
    q, k = torch.randn(2, 1, 1, 1, 2 * half, generator=g(seed), dtype=torch.float32)

    def score(a: int, b: int) -> float:
        rotated = []
        for x, at in ((q, a), (k, b)):
            x = x.clone()
            cache = torch.zeros(1, 800, 1, 2 * half)
            position = torch.tensor([at], dtype=torch.int32)
            zero = torch.zeros(1, dtype=torch.int32)
            turn = angles.cos().float(), angles.sin().float()
            mk.rotary_append(x, x.clone(), x, *turn, cache, cache.clone(), position, zero, backend="reference")
            assert torch.equal(cache[0, at], x[0, 0])
            rotated.append(x)
        assert torch.allclose(rotated[0].norm(), q.norm(), rtol=1e-5)
        return float((rotated[0] * rotated[1]).sum())

    assert score(first, second) == pytest.approx(
        score(first + shift, second + shift), abs=1e-4 * float(q.norm() * k.norm())
    )


# draft_heads


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 20),
    st.integers(1, 60),
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_draft_heads_are_log_softmax_and_topk(batch, heads, layers, size, vocab, own, bias, seed):
    hidden = torch.randn(batch, size, generator=g(seed))
    blocks = torch.randn(heads, layers, size, size, generator=g(seed + 1)) / size
    biases = torch.randn(heads, layers, size, generator=g(seed + 2)) if bias else None
    lm_head = torch.randn(*([heads] if own else []), vocab, size, generator=g(seed + 3))
    tokens, logprobs = mk.draft_heads(hidden, blocks, biases, lm_head, vocab, backend="reference")
    exact, plain = (
        oracles.head_logprobs(hidden, blocks, biases, lm_head, dtype).flatten(0, 1)
        for dtype in (torch.float64, torch.float32)
    )
    assert_ranked(tokens.flatten(0, 1), logprobs.flatten(0, 1), exact, plain)
    few = mk.draft_heads(hidden, blocks, biases, lm_head, 1 + vocab // 2, backend="reference")
    assert torch.equal(few[0], tokens[..., : 1 + vocab // 2])


# Philox and the draw

KNOWN = [  # counter, key, output: the known-answer vectors that ship with Random123 (philox4x32, 10 rounds)
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN, ids=["zeros", "ones", "pi"])
def test_the_oracle_gives_the_known_answers(counter, key, output):
    assert oracles.philox4x32_10(counter, key) == output


def test_the_reference_gives_the_known_answer():
    assert sampling.philox_uniform(0, 0) == (0x6627E8D5 >> 8) / 2**24


@given(words64, words64)
def test_philox_equals_the_oracle(key, counter):
    u = sampling.philox_uniform(key, counter)
    assert u == oracles.uniform(key, counter)
    assert 0 <= u < 1
    assert u * 2**24 == int(u * 2**24)


@given(st.integers(-(2**63), 2**63 - 1))
def test_a_negative_seed_is_its_two_s_complement(seed):
    assert sampling.philox_uniform(seed, 3) == sampling.philox_uniform(seed % 2**64, 3)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), words64, st.integers(0, 2**63))
def test_a_draw_is_the_inverse_cdf_over_ascending_ids(weights, seed, counter):
    """Small integer weights: sums are exact, and so is the comparison."""
    assume(any(weights))
    u = oracles.uniform(seed, counter)
    target, running = u * sum(weights), list(itertools.accumulate(weights))
    assert sampling.draw(torch.tensor(weights, dtype=torch.float32), seed, counter) == next(
        token for token, mass in enumerate(running) if mass > torch.tensor(target, dtype=torch.float32)
    )


def test_a_draw_never_takes_a_token_of_no_weight(monkeypatch):
    """u just under 1 times the total may round up to the total: the last token of positive weight is meant."""
    monkeypatch.setattr(sampling, "philox_uniform", lambda seed, counter: 1 - 2**-24)
    for total in (3.0, 1e-30, 1e30):
        assert sampling.draw(torch.tensor([total, total, 0.0, 0.0]), 0, 0) == 1
    monkeypatch.setattr(sampling, "philox_uniform", lambda seed, counter: 0.0)
    assert sampling.draw(torch.tensor([0.0, 0.0, 2.0, 1.0]), 0, 0) == 2


@given(st.integers(2, 40), st.floats(0.2, 3.0), st.floats(0.05, 1.0), st.integers(0, 45), seeds)
def test_truncation_equals_the_warpers_of_transformers(vocab, temperature, top_p, top_k, seed):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(vocab, generator=g(seed)) * 2
    expected = process.TemperatureLogitsWarper(temperature)(None, logits[None].double())
    if top_k:
        expected = process.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        mass = expected[0].sort(descending=True).values.softmax(-1).cumsum(-1)
        assume((mass - top_p).abs().min() > GAP)
        expected = process.TopPLogitsWarper(top_p)(None, expected)
    weights = sampling.kept_weights(logits, temperature, top_p, top_k).double()
    assert torch.allclose(weights / weights.sum(), expected[0].softmax(-1), atol=1e-6)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(1, 12))
def test_top_k_keeps_the_lower_id_of_equal_logits(levels, top_k):
    weights = sampling.kept_weights(torch.tensor(levels, dtype=torch.float32), 1.0, 1.0, top_k)
    kept = sorted(sorted(range(len(levels)), key=lambda token: (-levels[token], token))[:top_k])
    assert weights.nonzero().flatten().tolist() == kept


# verify_tree


@given(trees(most=40), st.integers(1, 4), seeds)
def test_greedy_equals_a_search_of_all_paths(tree, vocab, seed):
    logits = torch.randint(0, 3, (1, tree.num_nodes, vocab), generator=g(seed)).float()  # many ties
    tokens = torch.randint(0, vocab, (1, tree.num_nodes), generator=g(seed), dtype=torch.int32)
    expected = oracles.verify(logits[0], tokens[0].tolist(), tree.parents.tolist(), "greedy")
    accepted, length, token = mk.verify_tree(logits, tokens, tree.parents, backend="reference")
    assert accepted[0, : len(expected.path)].tolist() == expected.path
    assert (int(length), int(token)) == (expected.accept_length, expected.token)
    assert (accepted[0, len(expected.path) :] == -1).all()


@pytest.mark.parametrize("mode", ["typical", "lossless"])
@given(
    trees(most=12),
    st.integers(1, 6),
    seeds,
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.sampled_from([1.0, 0.7]),
    st.sampled_from([0, 2]),
)
def test_sampled_modes_equal_a_search_of_all_paths(mode, tree, vocab, seed, temperature, top_p, top_k):
    logits = torch.randn(1, tree.num_nodes, vocab, generator=g(seed))
    tokens = torch.randint(0, vocab, (1, tree.num_nodes), generator=g(seed), dtype=torch.int32)
    numbers = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    expected = oracles.verify(logits[0], tokens[0].tolist(), tree.parents.tolist(), mode, **numbers)
    assume(expected.margin > GAP)
    accepted, length, token = mk.verify_tree(logits, tokens, tree.parents, mode=mode, **numbers, backend="reference")
    assert accepted[0, : len(expected.path)].tolist() == expected.path
    assert (int(length), int(token)) == (expected.accept_length, expected.token)


GRID = 8  # probabilities are eighths, so that a grid of u counts them exactly


def eighths(seed: int, rows: int, vocab: int) -> torch.Tensor:
    cuts = torch.randint(0, GRID + 1, (rows, vocab - 1), generator=g(seed)).sort(-1).values
    edges = torch.cat([torch.zeros(rows, 1), cuts, torch.full((rows, 1), GRID)], dim=1)
    return edges.diff(dim=-1).long()


@pytest.mark.parametrize(
    "choices", [[[0], [1], [0, 0], [0, 1]], [[0], [0, 0]], [[0], [1], [2]], []], ids=["tree", "chain", "star", "root"]
)
@pytest.mark.parametrize("seed", range(6))
def test_lossless_emits_the_target_distribution_exactly(choices, seed, monkeypatch):
    """Every u of a grid per depth: the share of each emitted text is the target's product of probabilities, with no
    error."""
    tree, vocab = Tree.from_choices(choices), 3
    shares = eighths(seed, tree.num_nodes, vocab)
    tokens = torch.randint(0, vocab, (1, tree.num_nodes), generator=g(seed), dtype=torch.int32)
    depth = tree.max_depth + 1
    us = {}
    monkeypatch.setattr(sampling, "philox_uniform", lambda seed, counter: us[counter])
    emitted = Counter()
    for grid in itertools.product(range(GRID), repeat=depth):
        us.update({d + 1: (i + 0.5) / GRID for d, i in enumerate(grid)})
        accepted, length, token = mk.verify_tree(
            shares.float().log()[None], tokens, tree.parents, mode="lossless", seed=0, backend="reference"
        )
        path = accepted[0, : int(length[0]) + 1].tolist()
        emitted[(*(int(tokens[0, node]) for node in path[1:]), int(token))] += 1

    def expected(node: int, text: tuple[int, ...], share: int, found: dict) -> dict:
        for token, weight in enumerate(shares[node].tolist()):
            children = [c for c in range(tree.num_nodes) if tree.parents[c] == node and tokens[0, c] == token]
            if not weight:
                continue
            if children:
                expected(children[0], (*text, token), share * weight, found)
            else:
                found[(*text, token)] = share * weight * GRID ** (depth - len(text) - 1)
        return found

    assert emitted == expected(0, (), 1, {})


@pytest.mark.parametrize("seed", range(4))
def test_typical_draws_its_next_token_from_the_target(seed, monkeypatch):
    shares = eighths(seed, 2, 4)
    logits, tree = shares.float().log()[None], Tree.named("chain-1")
    tokens = torch.tensor([[0, int(shares[0].argmax())]], dtype=torch.int32)
    us = {}
    monkeypatch.setattr(sampling, "philox_uniform", lambda seed, counter: us[counter])
    drawn = Counter()
    for i in range(GRID):
        us.update({1: (i + 0.5) / GRID, 2: (i + 0.5) / GRID})
        _, length, token = mk.verify_tree(logits, tokens, tree.parents, mode="typical", seed=0, backend="reference")
        drawn[int(token)] += 1
    assert int(length[0]) == 1  # the likeliest of four tokens always passes min(0.09, ...)
    assert drawn == {token: share for token, share in enumerate(shares[1].tolist()) if share}


@given(st.floats(0.0, 1.0), st.floats(0.0, 2.0), st.integers(2, 8), seeds, st.floats(0.3, 2.0))
def test_typical_s_threshold(epsilon, alpha, vocab, seed, temperature):
    logits = torch.randn(1, 2, vocab, generator=g(seed))
    p = (logits[0, 0].double() / temperature).softmax(-1)
    limit = min(epsilon, alpha * math.exp((p * p.log()).sum()))
    assume((p - limit).abs().min() > GAP)
    numbers = {"temperature": temperature, "posterior_threshold": epsilon, "posterior_alpha": alpha, "seed": 0}
    for token in range(vocab):
        tokens = torch.tensor([[0, token]], dtype=torch.int32)
        chain = Tree.named("chain-1").parents
        length = mk.verify_tree(logits, tokens, chain, mode="typical", **numbers, backend="reference")[1]
        assert int(length[0]) == int(p[token] > limit)
