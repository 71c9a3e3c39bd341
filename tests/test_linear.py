"""linear and pack_linear: every backend and every packed dtype against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from medusa_kernels import pack_linear
from medusa_kernels.linear import PACKED_DTYPES

from . import cases, oracles
from .backends import backends_for, matrix
from .cases import BF16, F16, F32, SHORT
from .tolerances import INT8_RELATIVE_NORM, assert_close

OP = "linear"
CPU = [pytest.param(b, id=b.id) for b in backends_for(OP) if b.door == "cpu"]
on_cpu = pytest.mark.parametrize("backend", CPU, indirect=True) if CPU else None


@dataclass(frozen=True)
class Case:
    rows: int = 3
    inputs: int = 64
    outputs: int = 48
    dtype: torch.dtype = F32
    weight: torch.dtype = F32
    bias: torch.dtype | None = None
    residual: bool = False
    layout: str = "dense"

    @property
    def mixed(self) -> bool:
        return self.dtype != self.weight

    @property
    def work(self) -> int:
        return self.rows * self.inputs * self.outputs

    def __str__(self) -> str:
        bias = f"-bias-{SHORT[self.bias]}" if self.bias else ""
        return (
            f"r{self.rows}-{self.inputs}x{self.outputs}-{SHORT[self.dtype]}-w{SHORT[self.weight]}{bias}"
            f"{'-residual' * self.residual}-{self.layout}"
        )


CASES = [
    *(Case(rows=r, residual=True) for r in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 129, 256)),
    *(Case(inputs=i) for i in (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 576, 1001)),
    *(Case(outputs=o, bias=F32) for o in (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 65, 127, 1001)),
    *(Case(dtype=d, weight=w) for d in (F32, BF16, F16) for w in (F32, BF16, F16)),
    *(Case(dtype=d, weight=d, bias=b, residual=True) for d in (BF16, F16) for b in (F32, BF16, F16)),
    *(Case(dtype=d, layout=layout, bias=F32, residual=True) for layout in ("gaps", "transposed") for d in (F32, BF16)),
]


def inputs(case: Case):
    g = cases.generator(case)
    x = cases.normal((case.rows, case.inputs), case.dtype, g)
    weight = cases.normal((case.outputs, case.inputs), case.weight, g, case.inputs**-0.5)
    bias = cases.normal((case.outputs,), case.bias, g) if case.bias else None
    residual = cases.normal((case.rows, case.outputs), case.dtype, g) if case.residual else None
    if case.layout == "gaps":
        x, residual, weight, bias = cases.strided(x), cases.strided(residual), cases.strided(weight), cases.spaced(bias)
    elif case.layout == "transposed":
        x, residual, weight = (cases.transposed(t) for t in (x, residual, weight))
    return x, weight, bias, residual


def compare(actual, case, x, weight, bias, residual):
    assert actual.dtype == case.dtype
    exact, plain = (oracles.linear(x, weight, bias, residual, dtype) for dtype in (torch.float64, case.dtype))
    assert_close(actual, exact, plain)


@matrix(OP, CASES)
def test_against_float64(backend, case):
    x, weight, bias, residual = inputs(case)
    compare(backend.run(OP, x, weight, bias, residual=residual), case, x, weight, bias, residual)


if CPU:
    PACKED = [
        *(
            Case(rows=r, outputs=o, inputs=i)
            for r in (1, 3, 8, 17, 64)
            for o, i in ((48, 64), (33, 65), (1, 1), (129, 576))
        ),
        *(Case(dtype=d, weight=d, bias=F32, residual=True) for d in (F32, BF16, F16)),
    ]

    @on_cpu
    @pytest.mark.parametrize("dtype", [d for d in PACKED_DTYPES if d != "int8"])
    @pytest.mark.parametrize("case", PACKED, ids=str)
    def test_packed_is_the_rounded_weight(backend, case, dtype):
        x, weight, bias, residual = inputs(case)
        packed = pack_linear(weight, dtype)
        assert packed.shape == tuple(weight.shape)
        rounded = weight.to(getattr(torch, dtype))
        compare(backend.run(OP, x, packed, bias, residual=residual), case, x, rounded, bias, residual)

    @on_cpu
    @pytest.mark.parametrize("case", [c for c in PACKED if c.inputs >= 64], ids=str)
    def test_packed_int8_is_near(backend, case):
        x, weight, bias, _ = inputs(case)
        exact = oracles.linear(x, weight, bias, None, torch.float64)
        actual = backend.run(OP, x, pack_linear(weight, "int8"), bias)
        assert (actual.double() - exact).norm() <= INT8_RELATIVE_NORM * exact.norm()

    @on_cpu
    @pytest.mark.parametrize("dtype", [None, *PACKED_DTYPES])
    def test_a_row_does_not_depend_on_the_rows_beside_it(backend, dtype):
        """One order of summation, whatever the number of rows: what makes Medusa's logits plain decoding's, bit for
        bit."""
        x, weight, bias, _ = inputs(Case(rows=40, inputs=577, outputs=65, bias=F32))
        weight = weight if dtype is None else pack_linear(weight, dtype)
        whole = backend.run(OP, x, weight, bias)
        for rows in (1, 2, 3, 5, 8, 13, 17, 33):
            assert torch.equal(backend.run(OP, x[40 - rows :], weight, bias), whole[40 - rows :])
