"""Each known fault of the original Medusa that concerns trees, heads or acceptance, and a test that would catch it
here.

Faults of loading and of the driver (silent missing tensors, trailing EOS, detokenising, RoPE kinds, ...) are
tests/engine's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import medusa_kernels as mk
from medusa_kernels import Tree

from . import cases, oracles
from .backends import backends_for, every_backend


def one_hot(rows: list[int], vocab: int = 8) -> torch.Tensor:
    """Logits (1, n, vocab) whose argmax at node i is rows[i]."""
    return 10 * torch.nn.functional.one_hot(torch.tensor(rows), vocab).float()[None]


def i32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Sizes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = [0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen += [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        return result


def largest_tensor(call: Callable[[], object]) -> int:
    """Elements of the largest tensor that PyTorch makes during a call."""
    with Sizes() as sizes:
        call()
    return max(sizes.seen)


@every_backend("verify_tree")
def test_padding_is_never_accepted(backend):
    """The original pads short paths with node 0: a leaf whose argmax is token 0 goes on to "accept" the root."""
    tree = Tree.from_choices([[0], [1], [1, 0], [1, 0, 0]])  # leaves at depth 1 and 3
    tokens = i32([0, 5, 6, 7, 7])  # the root carries token 0
    accepted, length, token = backend.run("verify_tree", one_hot([5, 0, 0, 0, 0]), tokens, tree.parents)
    assert (accepted.tolist(), length.tolist(), token.tolist()) == ([[0, 1, -1, -1]], [1], [0])


def test_retrieve_indices_pad_with_minus_one():
    rows = Tree.from_choices([[0], [1], [1, 0], [1, 0, 0]]).retrieve_indices.tolist()
    assert rows == [[0, 1, -1, -1], [0, 2, 3, 4]]


@every_backend("compact_kv")
def test_padding_copies_no_row(backend):
    cache = torch.arange(6.0).view(1, 1, 1, 6, 1, 1).repeat(2, 2, 1, 1, 1, 1)
    before = cache.clone()
    backend.run("compact_kv", cache, i32([0, 3, -1, -1]), i32(1), i32(1))
    assert torch.equal(cache[0, 0, 0, :3, 0, 0], torch.tensor([0.0, 1.0, 4.0]))  # rows 1 + 0 and 1 + 3
    assert torch.equal(cache[..., :2, :, :], before[..., :2, :, :])


@every_backend("draft_heads")
def test_every_layer_of_a_head_has_its_own_weights(backend):
    """`[block] * layers` makes one block of all of them."""
    g = cases.generator("layers")
    hidden, blocks = torch.randn(1, 16, generator=g), torch.randn(1, 2, 16, 16, generator=g) / 4
    lm_head = torch.randn(16, 16, generator=g)
    own = backend.run("draft_heads", hidden, blocks, None, lm_head, 16)[1]
    tied = backend.run("draft_heads", hidden, blocks[:, :1].repeat(1, 2, 1, 1), None, lm_head, 16)[1]
    exact = oracles.head_logprobs(hidden, blocks, None, lm_head, torch.float64).sort(descending=True).values
    assert torch.allclose(own.double(), exact, atol=1e-4)
    assert not torch.allclose(own, tied, atol=1e-2)


@every_backend("draft_heads")
@pytest.mark.parametrize("heads", [1, 2, 4, 6, 9])
def test_any_number_of_heads(backend, heads):
    tokens, _ = backend.run("draft_heads", torch.eye(8)[:1], torch.zeros(heads, 1, 8, 8), None, torch.eye(8), 2)
    assert tokens.tolist() == [[[0, 1]] * heads]


def test_a_tree_deeper_than_the_heads_is_cut_to_them():
    """The original reads past its last head."""
    tree = Tree.named("chain-5")
    assert tree.num_heads == 5
    assert tree.prune(num_heads=3) == Tree.named("chain-3")
    assert tree.prune(num_heads=0) == Tree.from_choices([])


@every_backend("draft_heads")
def test_a_rank_of_ten_or_more_reads_its_own_head(backend):
    """The original flattens (heads, 10) and reads rank 12 of head 1 from head 2's rank 2."""
    tree = Tree.from_choices([[rank] for rank in range(13)] + [[12, 0]])
    assert tree.top_k == 13
    g = cases.generator("ranks")
    hidden, lm_heads = torch.randn(1, 8, generator=g), torch.randn(2, 40, 8, generator=g)
    draft, _ = backend.run("draft_heads", hidden, torch.zeros(2, 1, 8, 8), None, lm_heads, tree.top_k)
    depths, ranks = tree.depths[1:].long(), tree.ranks[1:].long()
    tokens = draft[0, depths - 1, ranks]
    exact = oracles.head_logprobs(hidden, torch.zeros(2, 1, 8, 8), None, lm_heads, torch.float64)[0]
    order = exact.sort(descending=True, stable=True).indices
    assert tokens.tolist() == order[depths - 1, ranks].tolist()
    assert tree.prune(top_k=10).top_k == 10


def test_heads_take_one_row_per_sequence():
    """The original runs every head on every node and keeps one row."""
    with pytest.raises(ValueError, match="hidden must have shape"):
        mk.draft_heads(torch.zeros(1, 64, 8), torch.zeros(1, 1, 8, 8), None, torch.zeros(9, 8), 1)


@pytest.mark.parametrize("backend", [b.door for b in backends_for("draft_heads") if b.door != "reference"][:1])
def test_the_heads_logits_never_reach_a_tensor(backend):
    """No tensor the size of (batch, heads, vocab) is made: only the (batch, heads, top_k) results are."""
    arguments = torch.ones(2, 8), torch.zeros(3, 1, 8, 8), None, torch.ones(1000, 8), 5
    assert largest_tensor(lambda: mk.draft_heads(*arguments, backend=backend)) <= 2 * 3 * 5


@every_backend("verify_tree")
def test_the_root_after_typical_acceptance_is_sampled(backend):
    """In the original it is always the argmax, so that temperature 0.7 is deterministic."""
    p = torch.tensor([0.5, 0.3, 0.2])
    draws = Counter()
    for start in range(0, 600, 100):
        logits = p.log().expand(100, 1, 3)
        offset = torch.arange(start, start + 100)
        tokens = torch.zeros(100, 1, dtype=torch.int32)
        keywords = {"mode": "typical", "seed": 5, "offset": offset}
        draws.update(backend.run("verify_tree", logits, tokens, i32(-1), **keywords)[2].tolist())
    assert all(
        abs(draws[token] / 600 - share) < 4 * (share * (1 - share) / 600) ** 0.5
        for token, share in enumerate(p.tolist())
    )


@every_backend("verify_tree")
def test_siblings_share_one_draw(backend):
    """The original's nucleus mode draws anew for every path: with all tokens as children, some child must always be
    accepted."""
    tree = Tree.from_choices([[rank] for rank in range(4)])
    logits = torch.zeros(50, 5, 4)
    tokens = i32([0, 0, 1, 2, 3]).expand(50, 5).contiguous()
    accepted, length, _ = backend.run(
        "verify_tree", logits, tokens, tree.parents, mode="lossless", seed=3, offset=torch.arange(50)
    )
    assert length.tolist() == [1] * 50
    assert [int(tokens[b, node]) for b, node in enumerate(accepted[:, 1])] == [
        int(4 * oracles.uniform(3, b + 1)) for b in range(50)
    ]


@pytest.mark.parametrize("backend", [b.door for b in backends_for("tree_attention") if b.door != "reference"][:1])
def test_grouped_heads_are_not_materialised(backend):
    """K/V stay at kv_heads: no tensor as large as one repeated cache is made."""
    q, cache = torch.ones(1, 2, 8, 8), torch.ones(1, 500, 1, 8)
    arguments = q, cache, cache, i32(400), Tree.named("chain-1").mask_words
    assert largest_tensor(lambda: mk.tree_attention(*arguments, backend=backend)) <= q.numel()
    assert largest_tensor(lambda: mk.tree_attention(*arguments, backend="reference")) > q.numel()


def test_a_full_cache_is_an_error():
    """The original writes past its preallocated K/V."""
    tree, full = Tree.named("chain-3"), i32(7)
    cache, q = torch.zeros(1, 10, 1, 8), torch.zeros(1, 4, 1, 8)
    angles = torch.zeros(20, 4)
    with pytest.raises(ValueError, match="cache_seqlens must hold values between 0 and 6; it holds 7"):
        mk.tree_attention(q, cache, cache.clone(), full, tree.mask_words)
    with pytest.raises(ValueError, match="cache_seqlens must hold values between 0 and 6; it holds 7"):
        mk.rotary_append(q, q.clone(), q.clone(), angles, angles, cache, cache.clone(), full, tree.depths)
    with pytest.raises(ValueError, match="accepted_nodes must stay inside the cache"):
        mk.compact_kv(torch.zeros(1, 2, 1, 10, 1, 8), i32([0, 3]), i32(1), full)


@every_backend("verify_tree")
def test_a_batch_is_its_sequences(backend):
    """The original takes one sequence."""
    g = cases.generator("batch")
    tree = Tree.named("3x2x2")
    logits = torch.randn(4, tree.num_nodes, 5, generator=g)
    tokens = cases.integers((4, tree.num_nodes), 0, 4, g)
    seed, offset = torch.arange(4), torch.arange(4) * 10
    for mode in ("greedy", "typical", "lossless"):
        together = backend.run("verify_tree", logits, tokens, tree.parents, mode=mode, seed=seed, offset=offset)
        for b in range(4):
            one = slice(b, b + 1)
            alone = backend.run(
                "verify_tree", logits[one], tokens[one], tree.parents, mode=mode, seed=seed[one], offset=offset[one]
            )
            assert all(torch.equal(a, t[one]) for a, t in zip(alone, together, strict=True))
