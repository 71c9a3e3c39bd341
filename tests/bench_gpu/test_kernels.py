"""Ops and their rivals: what is measured first, the rows of a case, and no time for what is wrong."""

from __future__ import annotations

import pytest
import torch

from bench import ops
from bench.gpu import kernels
from tests.bench_gpu.tiny import ATTENTION


def test_what_the_aims_are_stated_in_comes_first(options):
    names = [case.name for case in kernels.cases(options)]
    assert names[:3] == ["ceilings", "attention h32x32 n64 b1 prefix8192", "attention h32x8 n64 b1 prefix8192"]
    for start in ("attention h32x8 n16 b8 prefix32768", "draft_heads", "verify_tree lossless n64 v128256", "compact_kv",
                  "linear vicuna-7b qkv r16"):  # fmt: skip
        assert any(name.startswith(start) for name in names), start
    every = names[1:] + [case.name for case in kernels.more_cases(options)]
    assert sorted(every) == sorted(name for _, name, *_ in kernels.SHAPES)


def test_compiled_rivals_cover_the_grid_the_widest_first(options):
    names = [name for _, name, *_ in kernels.SHAPES]
    listed = [case.name for case in kernels.rival_cases(options)]
    assert set(listed) == {name for name in names if "attention" in name and " n1 " not in name}
    assert listed[:2] == ["attention h32x32 n64 b1 prefix2048", "attention h32x8 n64 b1 prefix2048"]


def test_rows_of_a_case(fast):
    rows = list(kernels.measure("tree_attention", "fp32", ATTENTION, kernels.attention_baseline, "cpu"))
    assert {row["implementation"] for row in rows} >= {"reference", "sdpa"}
    assert all(row["us"] == pytest.approx(100) for row in rows)
    assert all(row["percent_of_floor"] == pytest.approx(row["floor_us"]) for row in rows)


def test_a_rival_that_is_wrong_or_fails_gets_no_time(fast):
    def rivals(work):
        def fails():
            raise RuntimeError("not this shape")

        def unprepared():
            raise RuntimeError("no compiler")

        return {
            "wrong": lambda: lambda: torch.zeros_like(work.outputs[0]),
            "fails": lambda: fails,
            "unprepared": unprepared,
            "idle": lambda: lambda: None,
        }

    rows = {r["implementation"]: r for r in kernels.measure("tree_attention", "fp32", ATTENTION, rivals, "cpu")}
    assert "output 0 is off by" in rows["wrong"]["failed"]
    assert rows["fails"]["failed"] == "RuntimeError: not this shape"
    assert rows["unprepared"]["failed"] == "RuntimeError: no compiler"
    assert "off by nan" in rows["idle"]["failed"]
    assert "us" in rows["reference"]


@pytest.mark.parametrize("own", [False, True])
def test_torch_draft_heads_compute_draft_heads(own):
    work = kernels.made("draft_heads", "fp32", {"heads": 3, "hidden": 64, "vocab": 99, "top_k": 5, "own": own}, "cpu")
    reference = ops.call("draft_heads", "reference", "cpu", work)
    (prepare,) = kernels.baseline("draft_heads")(work).values()
    assert kernels.difference("draft_heads", work, prepare(), reference) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_backend_that_cannot_run_is_a_row_that_says_why(fast, monkeypatch):
    ours = kernels.ours
    monkeypatch.setattr(kernels, "ours", lambda op, work, device: ours(op, work, "cuda") | ours(op, work, "cpu"))
    rows = {r["implementation"]: r for r in kernels.measure("silu_mul", "fp32", {"rows": 2, "ffn": 8},
                                                            kernels.baseline("silu_mul"), "cpu")}  # fmt: skip
    assert rows.keys() == {"cuda", "cpu", "reference"}
    assert rows["cuda"]["failed"].startswith("ValueError: backend 'cuda'")


def test_a_slow_reference_is_timed_once(fast, monkeypatch):
    monkeypatch.setattr(kernels, "SLOW", 0.0)
    rows = {r["implementation"]: r for r in kernels.measure("silu_mul", "fp32", {"rows": 2, "ffn": 8},
                                                            kernels.baseline("silu_mul"), "cpu")}  # fmt: skip
    assert rows["cpu"]["us"] == pytest.approx(100)
    assert rows["cpu"]["times_reference"] == pytest.approx(rows["reference"]["us"] / 100)


@pytest.mark.parametrize("rows", [1, 3])
def test_torch_linear_computes_linear(rows):
    work = kernels.made("linear", "fp32", {"rows": rows, "inputs": 16, "outputs": 9}, "cpu")
    reference = ops.call("linear", "reference", "cpu", work)
    (prepare,) = kernels.baseline("linear")(work).values()
    assert kernels.difference("linear", work, prepare(), reference) == ""


@pytest.mark.parametrize("mode", ["greedy", "typical", "lossless"])
def test_the_logits_first_rival_is_right(mode):
    dims = {"n": 7, "hidden": 16, "vocab": 60, "mode": mode}
    rows = {
        r["implementation"]: r
        for r in kernels.measure("verify_lm_head", "fp32", dims, kernels.baseline("verify_lm_head"), "cpu")
    }
    assert {"reference", "cpu", "torch, verify_tree"} == set(rows)
    assert not any("failed" in row for row in rows.values())


def test_verify_tree_takes_half_the_bytes_in_bf16():
    dims = {"n": 4, "vocab": 100, "mode": "greedy"}
    work = kernels.made("verify_tree", "bf16", dims, "cpu")
    assert work.bytes == 4 * 100 * 2
    assert work.arguments[0].dtype == torch.bfloat16
