"""silu_mul: every backend against PyTorch's in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import cases, oracles
from .backends import every_backend, matrix
from .cases import BF16, F16, F32, SHORT
from .tolerances import assert_close

OP = "silu_mul"


@dataclass(frozen=True)
class Case:
    rows: int = 3
    ffn: int = 64
    dtype: torch.dtype = F32
    layout: str = "dense"
    size: float = 1.0

    @property
    def work(self) -> int:
        return self.rows * self.ffn

    def __str__(self) -> str:
        return f"r{self.rows}-f{self.ffn}-{SHORT[self.dtype]}-{self.layout}-size{self.size:g}"


CASES = [
    *(
        Case(ffn=f, dtype=d)
        for f in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 1001, 1536)
        for d in (F32, BF16, F16)
    ),
    *(Case(rows=r) for r in (1, 2, 16, 65, 256)),
    *(Case(layout=layout, dtype=d) for layout in ("gaps", "transposed") for d in (F32, BF16)),
    *(Case(size=s) for s in (0.0, 1e-20, 1e-3, 30.0)),
]


@matrix(OP, CASES)
def test_against_float64(backend, case):
    gate_up = cases.normal((case.rows, 2 * case.ffn), case.dtype, cases.generator(case), case.size)
    if case.layout != "dense":
        gate_up = (cases.strided if case.layout == "gaps" else cases.transposed)(gate_up)
    actual = backend.run(OP, gate_up)
    assert actual.dtype == case.dtype
    exact, plain = (oracles.silu_mul(gate_up, dtype) for dtype in (torch.float64, case.dtype))
    assert_close(actual, exact, plain)


@every_backend(OP)
def test_extreme_gates(backend):
    """silu is 0 far left and the identity far right; exp must neither overflow nor turn into NaN."""
    gate = torch.tensor([[-1e4, -200.0, -89.0, -88.0, 0.0, 88.0, 89.0, 200.0, 1e4]])
    out = backend.run(OP, torch.cat([gate, torch.ones_like(gate)], dim=1))
    assert_close(out, oracles.silu_mul(torch.cat([gate, torch.ones_like(gate)], dim=1), torch.float64), out)
    assert torch.isfinite(out).all()
    assert torch.equal(out[:, 4:], gate[:, 4:])
