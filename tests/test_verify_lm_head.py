"""verify_lm_head: every backend against a brute force in float64, and against linear and verify_tree of the same
backend, token for token.

Hidden rows and weights are small multiples of a power of two, so that a logit is the same in every order of summation
and rounds to one number; several are equal, so argmax meets ties. Draws and thresholds keep the distance that
test_verify_tree describes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from medusa_kernels import Tree, pack_linear
from medusa_kernels.linear import PACKED_DTYPES

from . import cases, test_verify_tree
from .backends import backends_for, every_backend, matrix
from .cases import BF16, F16, F32, SHORT
from .test_verify_tree import LOOSE, MODES, check
from .tolerances import GAP

OP = "verify_lm_head"
CPU = [pytest.param(b, id=b.id) for b in backends_for(OP) if b.door == "cpu"]


@dataclass(frozen=True)
class Case(test_verify_tree.Case):
    hidden: int = 16
    weight: torch.dtype = F32

    @property
    def work(self) -> int:
        return self.batch * self.n * self.vocab * self.hidden

    def __str__(self) -> str:
        return f"{super().__str__()}-h{self.hidden}-w{SHORT[self.weight]}"


MIXED = {"temperature": (0.7, 0.0, 1.0, 2.0, 0.5), "posterior_threshold": (0.09, 0.01, 0.3, 0.02, 0.0),
         "posterior_alpha": (0.3, 0.0, 1.0, 0.1, 0.5)}  # fmt: skip
HALF = ((BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16))

CASES = [
    *(Case(modes=(m,), n=n, batch=1) for m in MODES for n in (1, 2, 31, 64, 65, 256)),
    *(Case(modes=(m,), vocab=v, n=9) for m in MODES for v in (1, 2, 31, 32, 33, 127, 128, 129, 511, 512, 513, 1030)),
    *(Case(modes=(m,), dtype=d, weight=w, vocab=140, n=9) for m in MODES for d, w in HALF),
    *(Case(modes=(m,), dtype=BF16, weight=BF16, batch=1, n=n, hidden=h, vocab=70) for m in MODES
      for n, h in ((1, 8), (8, 24), (9, 40), (17, 264), (33, 72), (70, 16))),
    *(Case(modes=("lossless",), hidden=h, n=5, dtype=d, weight=d) for h in (1, 7, 33, 300) for d in (F32, F16)),
    *(Case(modes=(m,), dtype=d, weight=d, n=2, batch=1, vocab=9001, hidden=8) for m in MODES for d in (F32, BF16)),
    *(Case(modes=MODES, batch=b, own_trees=own, numbers=n, dtype=d, weight=d) for b, n in ((3, {}), (5, MIXED))
      for own in (False, True) for d in (F32, BF16)),
    *(Case(modes=("typical",), numbers=LOOSE, vocab=v, n=20) for v in (4, 11, 300)),
    *(Case(modes=(m,), duplicates=True, numbers=LOOSE) for m in MODES),
    *(Case(modes=(m,), kind=kind, n=9, wider=2) for m in MODES for kind in ("chain", "star")),
    *(Case(modes=MODES, batch=3, layout=layout, own_trees=True) for layout in ("gaps", "transposed", "expanded")),
    *(Case(modes=(m,), spread=s, vocab=600, n=6) for m in MODES for s in (0.01, 1e3)),
]  # fmt: skip


def inputs(case: Case):
    for attempt in itertools.count():
        arguments, keywords, verdicts = _inputs(case, cases.generator(f"{case}/{attempt}"))
        if min(verdict.margin for verdict in verdicts) > GAP:
            return arguments, keywords, verdicts


def _inputs(case: Case, g: torch.Generator):
    step = 2.0 ** torch.tensor(case.spread / case.hidden**0.5).log2().round()
    hidden = cases.integers((case.batch, case.n, case.hidden), -4, 4, g).to(case.dtype) / 4
    weight = (cases.integers((case.vocab, case.hidden), -4, 4, g) * step).to(case.weight)
    if case.vocab > 2:
        weight[torch.randperm(case.vocab, generator=g)[: case.vocab // 3]] = weight[0].clone()
    if case.layout == "expanded":
        hidden = hidden[:, :1].expand_as(hidden)
    logits = (hidden.double() @ weight.double().T).to(case.dtype)
    (_, tokens, parents), keywords, verdicts = test_verify_tree.posed(case, logits, g)
    if case.layout == "gaps":
        hidden = cases.strided(hidden)
    elif case.layout == "transposed":
        hidden = cases.transposed(hidden)
    return (hidden, weight, tokens, parents), keywords, verdicts


@matrix(OP, CASES)
def test_against_brute_force(backend, case):
    arguments, keywords, verdicts = inputs(case)
    check(case, backend.run(OP, *arguments, **keywords), arguments, keywords, verdicts)


def random_call(g: torch.Generator, batch: int, n: int, size: int, vocab: int, dtype: torch.dtype):
    """Hidden rows, an LM head with equal rows, and likely tokens in a random tree."""
    hidden = cases.normal((batch, n, size), dtype, g)
    weight = cases.normal((vocab, size), dtype, g, 3 * size**-0.5)
    weight[vocab // 2 : vocab // 2 + 3] = weight[0].clone()
    tree = cases.random_tree(n, g)
    likely = (hidden.float() @ weight.float().T).argsort(dim=-1, descending=True).int()
    tokens = torch.zeros(batch, n, dtype=torch.int32)
    for node in range(1, n):
        tokens[:, node] = likely[:, tree.parents[node], int(tree.ranks[node])]
    return hidden, weight, tokens, tree.parents


def two_ops(backend, hidden, weight, tokens, parents, **keywords):
    logits = backend.run("linear", hidden.flatten(0, 1), weight).view(*hidden.shape[:2], -1)
    return backend.run("verify_tree", logits, tokens, parents, **keywords)


@every_backend(OP)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=SHORT.get)
@pytest.mark.parametrize(("n", "size", "vocab"), [(12, 64, 300), (5, 300, 700), (3, 8, 5000)], ids=str)
def test_is_linear_then_verify_tree(backend, dtype, n, size, vocab):
    """Also where a sum or a draw is a near-tie: both routes add in one order."""
    g = cases.generator((dtype, n))
    for seed in range(8 if backend.fast else 1):
        arguments = random_call(g, 3, n, size, vocab, dtype)
        keywords = {"mode": list(MODES), "temperature": [1.0, 0.8, 0.6], "seed": seed} | LOOSE
        fused, apart = backend.run(OP, *arguments, **keywords), two_ops(backend, *arguments, **keywords)
        assert all(torch.equal(a, b) for a, b in zip(fused, apart, strict=True))


if CPU:

    @pytest.mark.parametrize("backend", CPU, indirect=True)
    @pytest.mark.parametrize("packed", PACKED_DTYPES)
    def test_packed_is_linear_then_verify_tree(backend, packed):
        g = cases.generator(packed)
        for seed, n in enumerate((1, 4, 9, 40)):
            hidden, weight, *tree = random_call(g, 3, n, 100, 1100, F32)
            keywords = {"mode": list(MODES), "seed": seed} | LOOSE
            arguments = hidden, pack_linear(weight, packed), *tree
            fused, apart = backend.run(OP, *arguments, **keywords), two_ops(backend, *arguments, **keywords)
            assert all(torch.equal(a, b) for a, b in zip(fused, apart, strict=True))


@every_backend(OP)
@pytest.mark.parametrize("mode", ["greedy", "lossless"])
def test_a_tree_says_what_its_nodes_say_alone(backend, mode):
    """Seeded plain decoding, which asks one node at a time, and seeded Medusa choose the same tokens."""
    g = cases.generator(mode)
    arguments, keywords, _ = _inputs(Case(n=7, batch=2, vocab=200, dtype=BF16, weight=BF16), g)
    hidden, weight, tokens, parents = arguments
    keywords = {"mode": mode, "seed": keywords["seed"]}
    accepted, length, token = backend.run(OP, hidden, weight, tokens, parents, **keywords)
    for b in range(2):
        for depth, node in enumerate(accepted[b, : int(length[b]) + 1].tolist()):
            alone = backend.run(
                OP, hidden[b : b + 1, node : node + 1], weight, tokens[b : b + 1, :1], Tree.from_choices([]).parents,
                mode=mode, seed=keywords["seed"][b : b + 1], offset=torch.tensor([depth]),
            )[2]  # fmt: skip
            following = accepted[b, depth + 1] if depth < int(length[b]) else -1
            assert int(alone) == int(tokens[b, following] if following >= 0 else token[b])


@every_backend(OP)
def test_argmax_ties_take_the_lowest_token(backend):
    """Rows of the LM head that are equal, in one tile of the vocabulary and in several."""
    root = Tree.from_choices([]).parents
    for low, high in ((0, 1), (5, 130), (3, 999), (600, 700)):
        weight = torch.zeros(1000, 8)
        weight[[low, high]] = 1.0
        for dtype in (F32, BF16):
            chosen = backend.run(
                OP, torch.ones(1, 1, 8, dtype=dtype), weight.to(dtype), torch.zeros(1, 1, dtype=torch.int32), root
            )[2]
            assert int(chosen) == low


@every_backend(OP)
@pytest.mark.parametrize("at", [0, 9, 700])
def test_greedy_takes_the_first_nan(backend, at):
    weight = torch.linspace(-1.0, 1.0, 1000)[:, None].expand(-1, 8).contiguous()
    weight[[at, 990]] = torch.nan
    root = torch.zeros(1, 1, dtype=torch.int32), Tree.from_choices([]).parents
    assert int(backend.run(OP, torch.ones(1, 1, 8), weight, *root)[2]) == at
