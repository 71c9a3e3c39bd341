"""draft_heads: every backend against log_softmax in float64; equal scores rank by id."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from medusa_kernels import pack_linear

from . import cases, oracles
from .backends import backends_for, every_backend, matrix
from .cases import BF16, F16, F32, SHORT
from .tolerances import assert_ranked

OP = "draft_heads"
CPU = [pytest.param(b, id=b.id) for b in backends_for(OP) if b.door == "cpu"]


@dataclass(frozen=True)
class Case:
    batch: int = 2
    heads: int = 3
    layers: int = 1
    hidden: int = 48
    vocab: int = 101
    top_k: int = 10
    own: bool = False
    bias: torch.dtype | None = None
    mapped: bool = False
    dtype: torch.dtype = F32
    weight: torch.dtype = F32
    layout: str = "dense"

    @property
    def head_dim(self) -> int:
        return self.hidden

    @property
    def mixed(self) -> bool:
        return self.dtype != self.weight

    @property
    def work(self) -> int:
        return self.batch * self.heads * self.hidden * (self.layers * self.hidden + self.vocab)

    def __str__(self) -> str:
        bias = f"-bias-{SHORT[self.bias]}" if self.bias else ""
        flags = "-own" * self.own + bias + "-mapped" * self.mapped
        return (
            f"b{self.batch}-heads{self.heads}-layers{self.layers}-h{self.hidden}-v{self.vocab}-k{self.top_k}{flags}"
            f"-{SHORT[self.dtype]}-w{SHORT[self.weight]}-{self.layout}"
        )


CASES = [
    *(Case(layers=n, own=own, bias=bias) for n in (0, 1, 2, 3) for own in (False, True) for bias in (None, F32)),
    *(Case(heads=h, own=own) for h in (1, 2, 5, 7) for own in (False, True)),
    *(Case(batch=b, mapped=mapped) for b in (1, 2, 3, 5, 8, 17) for mapped in (False, True)),
    *(Case(top_k=k) for k in (1, 2, 9, 11, 32, 33, 64, 65, 100, 101)),
    *(Case(hidden=h, vocab=v, top_k=3) for h, v in ((1, 3), (3, 17), (7, 64), (8, 65), (31, 127), (33, 128), (65, 129),
                                                    (100, 1001), (129, 333))),
    *(Case(vocab=v, top_k=v) for v in (1, 2, 257)),
    *(Case(vocab=5000, hidden=16, top_k=k) for k in (10, 300)),
    *(Case(dtype=d, weight=w, own=own) for d in (F32, BF16, F16) for w in (F32, BF16, F16) for own in (False, True)),
    *(Case(dtype=d, weight=d, bias=d, layers=2, mapped=True) for d in (BF16, F16)),
    *(Case(layout=layout, dtype=d, weight=d) for layout in ("gaps", "transposed") for d in (F32, BF16)),
]  # fmt: skip


def inputs(case: Case):
    g = cases.generator(case)
    hidden = cases.normal((case.batch, case.hidden), case.dtype, g)
    blocks = cases.normal((case.heads, case.layers, case.hidden, case.hidden), case.weight, g, case.hidden**-0.5)
    bias = cases.normal((case.heads, case.layers, case.hidden), case.bias, g) if case.bias else None
    shape = (case.heads, case.vocab, case.hidden) if case.own else (case.vocab, case.hidden)
    lm_head = cases.normal(shape, case.weight, g, 2 * case.hidden**-0.5)
    token_map = torch.randperm(3 * case.vocab, generator=g)[: case.vocab].int() if case.mapped else None
    if case.layout != "dense":
        hidden = (cases.strided if case.layout == "gaps" else cases.transposed)(hidden)
    return hidden, blocks, bias, lm_head, token_map


def compare(drafts, case, hidden, blocks, bias, lm_head, token_map):
    tokens, logprobs = drafts
    shape = (case.batch, case.heads, case.top_k)
    assert (tokens.shape, tokens.dtype) == (shape, torch.int32)
    assert (logprobs.shape, logprobs.dtype) == (shape, torch.float32)
    if token_map is not None:  # back to draft ids, over which the oracle ranks
        draft_id = {base: draft for draft, base in enumerate(token_map.tolist())}
        tokens = torch.tensor([draft_id[base] for base in tokens.flatten().tolist()]).view(shape)
    exact, plain = (
        oracles.head_logprobs(hidden, blocks, bias, lm_head, dtype).flatten(0, 1)
        for dtype in (torch.float64, torch.promote_types(case.dtype, blocks.dtype))
    )
    assert_ranked(tokens.flatten(0, 1), logprobs.flatten(0, 1), exact, plain)


@matrix(OP, CASES)
def test_against_log_softmax(backend, case):
    hidden, blocks, bias, lm_head, token_map = inputs(case)
    drafts = backend.run(OP, hidden, blocks, bias, lm_head, case.top_k, token_map=token_map)
    compare(drafts, case, hidden, blocks, bias, lm_head, token_map)


@every_backend(OP)
@pytest.mark.parametrize("top_k", [1, 7, 40])
@pytest.mark.parametrize("mapped", [False, True], ids=["", "mapped"])
def test_equal_scores_rank_by_draft_id(backend, top_k, mapped):
    """Small integers: every sum is exact in any order, so equal scores are equal in every backend."""
    g = cases.generator("ties")
    hidden = cases.integers((3, 16), -2, 2, g).float()
    blocks, lm_head = torch.zeros(2, 1, 16, 16), cases.integers((40, 16), -1, 1, g).float()
    token_map = torch.arange(39, -1, -1, dtype=torch.int32) if mapped else None  # base ids fall as draft ids rise
    scores = hidden @ lm_head.T
    ranked = [sorted(range(40), key=lambda token: (-row[token], token)) for row in scores.tolist()]
    assert any(len(set(row)) < 30 for row in scores.tolist())
    tokens, _ = backend.run(OP, hidden, blocks, None, lm_head, top_k, token_map=token_map)
    expected = torch.tensor([row[:top_k] for row in ranked], dtype=torch.int32)
    expected = 39 - expected if mapped else expected
    for head in range(2):
        assert torch.equal(tokens[:, head], expected)


@every_backend(OP)
def test_scores_of_one_log_probability_rank_by_their_logits(backend):
    """1 and 1 + 2^-23 differ; 1 - 20 and the other less 20 do not, in fp32."""
    lm_head = torch.tensor([[1.0], [1.0000001], [20.0]]).expand(-1, 8) / 8
    hidden, block = torch.ones(1, 8), torch.zeros(1, 1, 8, 8)
    tokens, _ = backend.run(OP, hidden, block, None, lm_head.contiguous(), 3)
    assert tokens.tolist() == [[[2, 1, 0]]]


@every_backend(OP)
def test_all_scores_equal(backend):
    tokens, logprobs = backend.run(OP, torch.ones(2, 8), torch.zeros(3, 1, 8, 8), None, torch.ones(70, 8), 70)
    assert torch.equal(tokens, torch.arange(70, dtype=torch.int32).expand(2, 3, 70))
    assert torch.allclose(logprobs.exp().sum(-1), torch.ones(2, 3))


@every_backend(OP)
def test_large_scores_do_not_overflow(backend):
    """Scores of 1e4 apart: exp of their difference underflows to 0, and no logprob is NaN."""
    lm_head = torch.zeros(33, 8)
    lm_head[:, 0] = torch.arange(33) * 1e3
    tokens, logprobs = backend.run(OP, torch.eye(8)[:1] * 10, torch.zeros(1, 1, 8, 8), None, lm_head, 3)
    assert tokens.tolist() == [[[32, 31, 30]]]
    assert logprobs.tolist() == [[[0.0, -1e4, -2e4]]]


@every_backend(OP)
@pytest.mark.parametrize("offset", [100.0, 1e4, 1e6])
def test_logprobs_keep_their_precision_far_from_zero(backend, offset):
    scores = torch.tensor([0.0, 1.0, 2.0, 1.0])
    lm_head = torch.zeros(4, 8)
    lm_head[:, 0] = offset + scores
    _, logprobs = backend.run(OP, torch.eye(8)[:1], torch.zeros(1, 1, 8, 8), None, lm_head, 4)
    expected = scores.double().log_softmax(0).sort(descending=True).values
    assert torch.allclose(logprobs[0, 0].double(), expected, rtol=1e-6, atol=0)


if CPU:

    @pytest.mark.parametrize("backend", CPU, indirect=True)
    @pytest.mark.parametrize("top_k", [3, 70])
    def test_nan_is_no_guess_before_any_number(backend, top_k):
        lm_head = torch.zeros(90, 8)
        lm_head[:, 0] = torch.arange(90.0)
        lm_head[[5, 40, 88], 0] = torch.nan
        tokens, _ = backend.run(OP, torch.eye(8)[:1], torch.zeros(1, 1, 8, 8), None, lm_head, top_k)
        assert tokens[0, 0].tolist() == [i for i in reversed(range(90)) if i not in (5, 40, 88)][:top_k]

    @pytest.mark.parametrize("backend", CPU, indirect=True)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
    @pytest.mark.parametrize("which", ["blocks", "lm_head", "both"])
    def test_packed_is_the_rounded_weight(backend, dtype, own, which):
        case = Case(layers=2, own=own, vocab=203)
        hidden, blocks, bias, lm_head, token_map = inputs(case)
        rounded = getattr(torch, dtype)
        arguments = [pack_linear(w, dtype) if which in (name, "both") else w for name, w in
                     (("blocks", blocks), ("lm_head", lm_head))]  # fmt: skip
        blocks, lm_head = (w.to(rounded) if which in (name, "both") else w for name, w in
                           (("blocks", blocks), ("lm_head", lm_head)))  # fmt: skip
        drafts = backend.run(OP, hidden, arguments[0], bias, arguments[1], case.top_k)
        compare(drafts, case, hidden, blocks.float(), bias, lm_head.float(), token_map)

    @pytest.mark.parametrize("backend", CPU, indirect=True)
    def test_a_sequence_does_not_depend_on_its_neighbours(backend):
        hidden, blocks, _, lm_head, _ = inputs(Case(batch=8))
        tokens, logprobs = backend.run(OP, hidden, blocks, None, lm_head, 10)
        for b in range(8):
            alone = backend.run(OP, hidden[b : b + 1], blocks, None, lm_head, 10)
            assert torch.equal(alone[0], tokens[b : b + 1])
            assert torch.equal(alone[1], logprobs[b : b + 1])
