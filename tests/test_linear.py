"""linear and pack_linear: every backend and every packed dtype against float64."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from medusa_kernels import _backends, launches, pack_linear
from medusa_kernels.linear import PACKED_DTYPES

from . import cases, oracles
from .backends import backends_for, matrix
from .cases import BF16, F16, F32, SHORT
from .tolerances import INT8_RELATIVE_NORM, assert_close

OP = "linear"
linear_room = importlib.import_module("medusa_kernels.linear")  # the package's own `linear` is the front door
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
    *(
        Case(rows=r, dtype=d, weight=d, bias=b, residual=residual)  # in CUDA another product from 17 on
        for r, d in ((16, BF16), (17, BF16), (64, F16))
        for b, residual in ((None, False), (d, False), (None, True), (d, True), (F32, True))
    ),
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


HALF = [
    Case(rows=r, dtype=d, weight=d, bias=bias and d, residual=residual, inputs=i, outputs=o)
    for d in (BF16, F16)
    for r, i, o in ((17, 64, 48), (64, 577, 33), (65, 7, 1))
    for bias, residual in ((False, False), (True, False), (False, True), (True, True))
]


@pytest.mark.parametrize("aliased", [False, True])
@pytest.mark.parametrize("case", HALF, ids=str)
def test_pytorch_s_product_against_float64(case, aliased):
    """What CUDA does with many rows; its residual may be the output."""
    x, weight, bias, residual = inputs(case)
    out = residual.clone() if aliased and residual is not None else torch.full((case.rows, case.outputs), torch.nan)
    out = out.to(case.dtype)
    linear_room.multiply(x, weight, bias, out if aliased and residual is not None else residual, out)
    compare(out, case, x, weight, bias, residual)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_pytorch_s_product_makes_no_tensor(bias, residual):
    """Nothing that is written is new, and the residual that is `out` is read where it lies."""
    case = Case(rows=17, dtype=BF16, weight=BF16, bias=BF16 if bias else None, residual=residual)
    x, weight, bias, residual = (t if t is None else t.requires_grad_() for t in inputs(case))
    out = torch.zeros(17, case.outputs, dtype=BF16) if residual is None else residual.detach()
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            seen.append((func.overloadpacket.__name__, result.data_ptr()))
            return result

    with Watch():
        linear_room.multiply(x, weight, bias, None if residual is None else out, out)
    product = "mm" if bias is None and residual is None else "addmm"
    expected = [("t", weight.data_ptr()), (product, out.data_ptr())]
    assert seen == expected + [("add_", out.data_ptr())] * (bias is not None and residual is not None)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=SHORT.get)
def test_pytorch_s_product_sums_in_fp32(dtype, monkeypatch):
    """Whatever PyTorch's flags say, which stay as they were."""
    flags, name = torch.backends.cuda.matmul, linear_room._HALF_SUMS[dtype]
    during = []
    monkeypatch.setattr(torch, "mm", lambda x, weight, *, out: during.append(getattr(flags, name)))
    before = getattr(flags, name)
    x = torch.zeros(17, 8, dtype=dtype)
    try:
        for allowed in (True, False):
            setattr(flags, name, allowed)
            linear_room.multiply(x, x, None, None, torch.empty(17, 17, dtype=dtype))
            assert getattr(flags, name) == allowed
    finally:
        setattr(flags, name, before)
    assert during == [False, False]


MANY = linear_room.FEW_ROWS + 1


@pytest.mark.parametrize(
    ("case", "ours"),
    [
        (Case(rows=MANY - 1, dtype=BF16, weight=BF16), True),
        (Case(rows=MANY, dtype=BF16, weight=BF16, bias=BF16), False),
        (Case(rows=MANY, dtype=F16, weight=F16, residual=True), False),
        (Case(rows=MANY, dtype=BF16, weight=BF16, bias=F32), True),
        (Case(rows=MANY, dtype=BF16, weight=F16), True),
        (Case(rows=MANY), True),
    ],
    ids=str,
)
@pytest.mark.parametrize("row_invariant", [False, True])
def test_cuda_chooses_by_rows_and_dtype(case, ours, row_invariant, monkeypatch):
    """At the binding, which a captured step and the front door share."""
    device, launched = torch.device("cuda", 0), []
    monkeypatch.setattr(_backends, "cuda_unavailable", lambda: "")
    monkeypatch.setattr(_backends.Native, "unavailable", lambda self: "")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
    launch = launches.resolve_all("auto", device, row_invariant=row_invariant)["linear"]
    assert launches.capturable(launch)
    monkeypatch.setattr(launch, "function", lambda *arguments: launched.append(arguments[-1]), raising=False)
    x, weight, bias, residual = inputs(case)
    out = torch.full((case.rows, case.outputs), torch.nan, dtype=case.dtype)
    call = launches.bind(launch, x, weight, bias, residual, out)
    assert call.launch is launch
    for values in (x, x.neg()):
        x = x.copy_(values)
        call()
        if not (ours or row_invariant):
            compare(out, case, x, weight, bias, residual)
    assert launched == [5, 5] * (ours or row_invariant)


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
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_packed_int8_keeps_what_is_not_finite(backend, bad):
        x = torch.ones(2, 130)
        x[0, 70] = bad
        out = backend.run(OP, x, pack_linear(torch.ones(5, 130), "int8"))
        assert out[0].isnan().all()
        assert out[1].isfinite().all()
        weight = torch.ones(5, 130)
        weight[3, 70] = bad
        out = backend.run(OP, torch.ones(2, 130), pack_linear(weight, "int8"))
        assert out[:, 3].isnan().all()
        assert out[:, [0, 1, 2, 4]].isfinite().all()

    @on_cpu
    def test_packed_int8_of_the_smallest_numbers(backend):
        out = backend.run(OP, torch.full((1, 64), 1e-37), pack_linear(torch.ones(5, 64), "int8"))
        assert (out.abs() <= 65e-37).all()

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
