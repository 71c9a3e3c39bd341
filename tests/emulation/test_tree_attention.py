"""What the op matrix leaves out: tensor-core shapes, splits that the last block combines, threads in falling order."""

from __future__ import annotations

import pytest
import torch

from tests import oracles
from tests.backends import Backend
from tests.cases import BF16, F16
from tests.test_tree_attention import Case, inputs
from tests.tolerances import assert_close

from .launches import LAUNCHES

EMULATED = Backend("cuda-emulated", "cuda", launches=LAUNCHES)

CASES = [
    Case(n=64, batch=1, heads=1, kv_heads=1, head_dim=128, prefix=200, dtype=BF16),
    Case(n=7, batch=2, heads=8, kv_heads=2, head_dim=80, prefix=190, dtype=F16, own_masks=True),
    Case(n=40, batch=1, heads=4, kv_heads=1, head_dim=72, prefix=63, dtype=BF16),  # more than one tile of rows
    Case(n=3, batch=1, heads=2, kv_heads=1, head_dim=256, prefix=130, dtype=BF16),
    Case(n=2, batch=3, heads=1, kv_heads=1, head_dim=8, prefix=300, dtype=F16),
    Case(n=130, kind="chain", batch=1, heads=1, kv_heads=1, head_dim=16, prefix=1, dtype=BF16),
    Case(n=1, batch=2, heads=3, kv_heads=3, head_dim=64, prefix=257, dtype=BF16),
    *(Case(n=20, batch=1, heads=2, kv_heads=1, head_dim=64, prefix=90, dtype=BF16, scale=s) for s in (0.0, -0.2)),
    Case(n=3, batch=1, heads=2, kv_heads=1, head_dim=24, prefix=760, dtype=BF16),  # 12 splits, of which 8 load at once
]


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_dense_mask(case, order, monkeypatch):
    if order == "falling":
        monkeypatch.setenv("MEDUSA_EMULATE_REVERSED", "1")
    (q, k, v, lengths, mask), visible = inputs(case)
    with EMULATED.active():
        actual = EMULATED.run("tree_attention", q, k, v, lengths, mask, scale=case.scale)
    exact, plain = (
        oracles.tree_attention(q, k, v, lengths, visible, case.scale, dtype) for dtype in (torch.float64, case.dtype)
    )
    assert_close(actual, exact, plain)
