"""What the op matrix leaves out: threads and blocks in falling order, more slices than lanes, row tiles that sequences
share."""

from __future__ import annotations

import pytest
import torch

from tests.backends import Backend
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
