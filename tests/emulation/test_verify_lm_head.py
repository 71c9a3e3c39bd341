"""What the op matrix leaves out: threads and blocks in falling order, more slices than lanes, row tiles that sequences
share, rows without a distribution."""

from __future__ import annotations

import pytest
import torch

from tests.backends import REFERENCE, Backend
from tests.cases import BF16, F32, generator
from tests.test_verify_lm_head import random_call, two_ops
from tests.test_verify_tree import LOOSE, MODES

from .launches import LAUNCHES

EMULATED = Backend("cuda-emulated", "cuda", launches=LAUNCHES)
OP = "verify_lm_head"


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize(
    ("n", "size", "vocab", "dtype"), [(30, 72, 300, BF16), (5, 16, 4300, BF16), (5, 12, 300, F32)], ids=str
)
def test_is_linear_then_verify_tree(order, n, size, vocab, dtype, monkeypatch):
    if order == "falling":
        monkeypatch.setenv("MEDUSA_EMULATE_REVERSED", "1")
    arguments = random_call(generator((n, size)), 3, n, size, vocab, dtype)
    keywords = {"mode": list(MODES), "seed": 5} | LOOSE
    with EMULATED.active():
        fused, apart = EMULATED.run(OP, *arguments, **keywords), two_ops(EMULATED, *arguments, **keywords)
    assert all(torch.equal(a, b) for a, b in zip(fused, apart, strict=True))


UNDEFINED = {"nan": [torch.nan], "some-nan": [1.0, torch.nan, 0.5], "-inf": [-torch.inf], "inf": [torch.inf, 0.0]}
TRUNCATED = ({}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.5})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vocab", [5, 40, 300])
@pytest.mark.parametrize("row", UNDEFINED)
def test_a_row_of_no_distribution_gives_a_token_of_the_vocabulary(row, vocab, mode):
    logits = torch.tensor(UNDEFINED[row]).repeat(vocab)[:vocab].reshape(1, 1, vocab)
    tokens, parents = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([-1], dtype=torch.int32)
    for numbers in TRUNCATED if mode != "greedy" else ({},):
        arguments = (logits, tokens, parents)
        keywords = {"mode": mode, "seed": 3, **numbers}
        with EMULATED.active():
            token = EMULATED.run("verify_tree", *arguments, **keywords)[2]
        assert 0 <= int(token) < vocab
        if row.endswith("nan"):
            assert torch.equal(token, REFERENCE.run("verify_tree", *arguments, **keywords)[2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vocab", [5, 300])
def test_hidden_rows_of_nan_agree_with_verify_tree(vocab, mode):
    hidden, weight = torch.full((1, 1, 8), torch.nan, dtype=BF16), torch.ones(vocab, 8, dtype=BF16)
    tokens, parents = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([-1], dtype=torch.int32)
    keywords = {"mode": mode, "seed": 3}
    with EMULATED.active():
        fused = EMULATED.run(OP, hidden, weight, tokens, parents, **keywords)
        apart = two_ops(EMULATED, hidden, weight, tokens, parents, **keywords)
    assert 0 <= int(fused[2]) < vocab
    assert all(torch.equal(a, b) for a, b in zip(fused, apart, strict=True))
