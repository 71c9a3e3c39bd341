"""Triton beyond the interpreted matrix: every kernel compiles for absent GPUs, and an engine can ask for it."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medusa_kernels import _backends, launches, verify_tree

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {
    name
    for path in (ROOT / "medusa_kernels" / "triton").glob("*.py")
    for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
}
# That one program may have; for sm_80, which has 163 KB, those of its smaller kin sm_86 and sm_89.
SHARED_BYTES = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# What the kernels use of triton.language, each name seen in Triton 3.6.0: the oldest that is supported.
OLDEST_LANGUAGE = {
    "arange", "cdiv", "ceil", "constexpr", "cumsum", "debug_barrier", "dot", "dtype", "exp", "exp2", "full", "load",
    "log", "max", "maximum", "min", "minimum", "philox", "program_id", "store", "sum", "where", "zeros",
    "bfloat16", "float16", "float32", "float64", "int32", "int64", "uint32",
}  # fmt: skip
COVERED = ("tree_attention", "draft_heads", "verify_tree", "compact_kv")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """In a process of its own: whether Triton interprets is settled when it is imported."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_kernel_compiles_without_spills(target):
    done = python("-m", "bench.triton_aot", "--targets", target, "--brief", "--json", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["stack_bytes"] == 0, row
        assert row["shared_bytes"] <= SHARED_BYTES[target], row
        assert row["registers"] > 0, row


@needs_triton
def test_recorded_plans_are_the_present_ones_and_fit_their_gpus():
    """Every case, not only the brief ones; `make all-arch` records them anew."""
    code = """
import json
from bench import triton_aot
for row, _ in triton_aot.plans(list(triton_aot.PROCESSORS), triton_aot.CASES):
    print(json.dumps(row))
"""
    done = python("-c", code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    plans = [json.loads(line) for line in done.stdout.splitlines()]
    recorded = [json.loads(line) for line in (ROOT / "bench/results/triton-aot.jsonl").read_text().splitlines()]
    assert [{field: row.get(field) for field in plan} for row, plan in zip(recorded, plans, strict=True)] == plans
    for row in recorded:
        assert row["shared_bytes"] <= SHARED_BYTES[row["target"]], row


def test_kernels_use_nothing_that_the_oldest_triton_lacks():
    used = {
        node.attr
        for path in (ROOT / "medusa_kernels" / "triton").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tl"
    }
    assert used <= OLDEST_LANGUAGE, used - OLDEST_LANGUAGE


@needs_triton
def test_what_is_interpreted_is_not_compiled():
    done = python("-m", "bench.triton_aot", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET must not be 1" in done.stderr


def test_without_triton_the_backend_says_so():
    code = """
import sys, torch
sys.modules["triton"] = None
import medusa_kernels as mk
try:
    mk.compact_kv(torch.zeros(1, 2, 1, 4, 1, 8), *[torch.zeros(s, dtype=torch.int32) for s in ((1, 1), 1, 1)],
                  backend="triton")
except ValueError as error:
    print(error)
"""
    done = python("-c", code)
    assert re.fullmatch(
        r"backend 'triton' is not available for compact_kv: Triton cannot be imported \(.+\); "
        r"run `pip install triton`\n",
        done.stdout,
    ), done.stdout + done.stderr


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted only where there is no GPU")
def test_an_engine_s_other_ops_are_those_of_auto():
    device = torch.device("cpu")
    triton, auto = (launches.resolve_all(name, device) for name in ("triton", "auto"))
    for op, launch in triton.items():
        assert isinstance(launch, _backends.Lazy) if op in COVERED else launch is auto[op]


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted only where there is no GPU")
@pytest.mark.parametrize("mode", ["greedy", "typical", "lossless"])
@pytest.mark.parametrize("vocab", [5, 4100])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_rows_without_a_distribution_give_a_token_of_the_vocabulary(vocab, mode):
    """4100: more than one block. Greedy, PyTorch's argmax."""
    nan, inf = torch.nan, torch.inf
    for first, others in ((nan, nan), (1.0, nan), (-inf, -inf), (inf, 0.0), (0.5, -inf)):
        logits = torch.full((1, 2, vocab), others)
        logits[..., 0] = first
        logits[:, 1] = logits[:, 1].flip(-1)
        tree = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([-1, 0], dtype=torch.int32)
        seed = None if mode == "greedy" else 1
        results = [verify_tree(logits, *tree, mode=mode, seed=seed, backend=b) for b in ("triton", "reference")]
        assert 0 <= results[0][2].item() < vocab, (first, others)
        if mode == "greedy":
            assert all(map(torch.equal, *results)), (first, others)
