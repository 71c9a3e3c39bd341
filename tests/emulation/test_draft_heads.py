"""What the op matrix leaves out: candidates from many slices of the vocabulary, deep lists, equal scores."""

from __future__ import annotations

import pytest
import torch

from tests.backends import REFERENCE, Backend
from tests.cases import BF16, F32, generator, normal

from .launches import LAUNCHES

EMULATED = Backend("cuda-emulated", "cuda", launches=LAUNCHES)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_equal_scores_in_different_slices_rank_by_id(dtype, own):
    g = generator((dtype, own))
    batch, heads, hidden, vocab, top_k = 2, 3, 16, 700, 256
    rows = normal([heads, 7, hidden] if own else [7, hidden], dtype, g)
    lm_head = rows.repeat_interleave(100, dim=-2)[..., torch.randperm(vocab, generator=g), :].contiguous()
    args = (normal([batch, hidden], dtype, g), normal([heads, 1, hidden, hidden], dtype, g, 0.2), None, lm_head, top_k)
    with EMULATED.active():
        tokens, logprobs = EMULATED.run("draft_heads", *args)
    expected, exact = REFERENCE.run("draft_heads", *args)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, exact, atol=0.05 if dtype == BF16 else 1e-5, rtol=0)
