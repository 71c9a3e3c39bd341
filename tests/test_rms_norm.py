"""rms_norm: every backend against PyTorch's in float64, with and without the residual that it updates in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import cases, oracles
from .backends import every_backend, matrix
from .cases import BF16, F16, F32, SHORT
from .tolerances import assert_close

OP = "rms_norm"


@dataclass(frozen=True)
class Case:
    rows: int = 3
    hidden: int = 64
    dtype: torch.dtype = F32
    weight_dtype: torch.dtype = F32
    residual: bool = True
    layout: str = "dense"
    size: float = 1.0  # of x
    eps: float = 1e-5

    @property
    def work(self) -> int:
        return self.rows * self.hidden

    def __str__(self) -> str:
        return (
            f"r{self.rows}-h{self.hidden}-{SHORT[self.dtype]}-w{SHORT[self.weight_dtype]}{'-residual' * self.residual}"
            f"-{self.layout}-size{self.size:g}-eps{self.eps:g}"
        )


CASES = [
    *(
        Case(hidden=h, residual=r)
        for h in (1, 2, 3, 7, 8, 15, 16, 17, 33, 63, 65, 127, 576, 1001, 4096)
        for r in (False, True)
    ),
    *(Case(rows=r) for r in (1, 2, 16, 65, 256)),
    *(Case(dtype=d, weight_dtype=w, hidden=h) for d in (F32, BF16, F16) for w in (F32, BF16, F16) for h in (31, 576)),
    *(Case(layout=layout, dtype=d) for layout in ("gaps", "transposed") for d in (F32, BF16)),
    Case(size=1e4),
    Case(size=1e-6),
    Case(size=0.0),
    Case(size=1e-4, dtype=F16, residual=False),  # squares underflow in fp16
    Case(size=2e3, dtype=F16, residual=False),  # squares overflow in fp16
    Case(eps=1.0),
]


@matrix(OP, CASES)
def test_against_float64(backend, case):
    g = cases.generator(case)
    shape = (case.rows, case.hidden)
    x = cases.normal(shape, case.dtype, g, case.size)
    weight = cases.normal(shape[1:], case.weight_dtype, g)
    residual = cases.normal(shape, case.dtype, g, case.size) if case.residual else None
    if case.layout == "gaps":
        x, residual, weight = cases.strided(x), cases.strided(residual), cases.spaced(weight)
    elif case.layout == "transposed":
        x = cases.transposed(x)
    total = x if residual is None else (residual.float() + x.float()).to(case.dtype)
    actual = backend.run(OP, x, weight, case.eps, residual=residual)
    assert actual.dtype == case.dtype
    if residual is not None:
        assert torch.equal(residual, total)  # one addition, rounded once
    exact, plain = (oracles.rms_norm(total, weight, case.eps, dtype) for dtype in (torch.float64, case.dtype))
    assert_close(actual, exact, plain)


@every_backend(OP)
def test_a_row_does_not_depend_on_its_neighbours(backend):
    g = cases.generator("rows")
    x, weight = cases.normal((9, 100), F32, g), cases.normal((100,), F32, g)
    together = backend.run(OP, x, weight, 1e-5)
    for row in range(9):
        assert torch.equal(backend.run(OP, x[row : row + 1], weight, 1e-5), together[row : row + 1])
