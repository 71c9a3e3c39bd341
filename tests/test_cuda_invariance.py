"""What CUDA promises if asked to: a row's bits do not depend on its neighbours nor on its place in the tree."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch

import medusa_kernels

from . import cases, oracles
from .backends import Backend, backends_for
from .cases import BF16, F16, F32, SHORT
from .test_tree_attention import Case, inputs
from .tolerances import assert_close

CUDA = [pytest.param(b, id=b.id) for b in backends_for("tree_attention") if b.door == "cuda"]
pytestmark = pytest.mark.parametrize("backend", CUDA, indirect=True)


def row_invariant(backend: Backend, op: str, *tensors, monkeypatch) -> torch.Tensor:
    """The op's front door, asked for row invariance, or what runs its kernel on the CPU."""
    options = {"row_invariant": True, "backend": "cuda"}
    if backend.launches is not None:
        launch = importlib.import_module("tests.emulation.launches").launch
        table = importlib.import_module(f"medusa_kernels.{op}").ROW_INVARIANT
        asked = {"row_invariant": True} if op == "tree_attention" else {}
        monkeypatch.setitem(table, "cpu", functools.partial(launch, op, **asked))
        options["backend"] = "cpu"
    return getattr(medusa_kernels, op)(*(t.to(backend.device) for t in tensors), **options).cpu()


CASES = [
    Case(n=13, batch=1, prefix=0, dtype=BF16, head_dim=64),
    Case(n=40, batch=1, heads=3, kv_heads=1, prefix=61, dtype=BF16, head_dim=64),
    Case(n=9, batch=1, heads=2, kv_heads=1, prefix=250, dtype=F16, head_dim=24),
    Case(n=70, kind="chain", batch=1, heads=1, kv_heads=1, prefix=31, dtype=BF16, head_dim=16),
    Case(n=7, batch=1, heads=2, kv_heads=2, prefix=290, dtype=F32, head_dim=20),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_tree_node_attends_as_plain_decoding(backend, case, monkeypatch):
    (q, k, v, lengths, mask), visible = inputs(case)
    run = functools.partial(row_invariant, backend, "tree_attention", monkeypatch=monkeypatch)
    whole = run(q, k, v, lengths, mask)
    exact, plain = (oracles.tree_attention(q, k, v, lengths, visible, None, t) for t in (torch.float64, case.dtype))
    assert_close(whole, exact, plain)
    prefix, one = int(lengths[0]), torch.ones(1, 1, dtype=torch.int64)
    for node in range(case.n):
        path = visible[0, node].nonzero()[:, 0]
        kept = torch.cat([torch.arange(prefix), prefix + path])
        alone = run(q[:, node : node + 1], k[:, kept], v[:, kept], lengths + len(path) - 1, one)
        assert torch.equal(alone[0, 0], whole[0, node])


def test_the_rows_of_a_batch_stand_alone(backend, monkeypatch):
    (q, k, v, lengths, mask), _ = inputs(Case(batch=3, own_masks=True, dtype=BF16, prefix=90))
    run = functools.partial(row_invariant, backend, "tree_attention", monkeypatch=monkeypatch)
    together = run(q, k, v, lengths, mask)
    for b in range(3):
        assert torch.equal(run(*(t[b : b + 1] for t in (q, k, v, lengths, mask))), together[b : b + 1])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=SHORT.get)
def test_a_linear_row_stands_alone(backend, dtype, monkeypatch):
    g = cases.generator("linear rows")
    x, weight = cases.normal((65, 136), dtype, g), cases.normal((48, 136), dtype, g)
    run = functools.partial(row_invariant, backend, "linear", monkeypatch=monkeypatch)
    whole = run(x, weight)
    for count in (1, 3, 8, 9, 16, 17, 32, 33, 64):
        assert torch.equal(run(x[:count], weight), whole[:count])
    assert torch.equal(run(x[40:41], weight), whole[40:41])
    assert torch.equal(backend.run("linear", x[:16], weight), whole[:16])  # few rows are so without being asked


@pytest.mark.parametrize("dtype", [F32, BF16], ids=SHORT.get)
def test_rows_of_the_small_ops_stand_alone(backend, dtype):
    g = cases.generator("small rows")
    x, weight, gate_up = cases.normal((5, 72), dtype, g), torch.ones(72), cases.normal((5, 144), dtype, g)
    normed, gated = backend.run("rms_norm", x, weight, 1e-5), backend.run("silu_mul", gate_up)
    for row in range(5):
        assert torch.equal(backend.run("rms_norm", x[row : row + 1], weight, 1e-5)[0], normed[row])
        assert torch.equal(backend.run("silu_mul", gate_up[row : row + 1])[0], gated[row])
