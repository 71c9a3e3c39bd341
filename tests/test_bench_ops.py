"""bench.ops: its line, its JSON, and that a wrong result gets no time."""

from __future__ import annotations

import json
import re

import pytest
import torch
from click.testing import CliRunner

from bench import _timing, ops

LINE = re.compile(r"(\S+ ){4}\d+\.\d us \| \d+\.\d GB/s \| \d+% of limit \| \d+\.\dx reference")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(_timing, "bandwidth", lambda device: 1e10)
    monkeypatch.setattr(_timing, "flops", lambda device: 1e11)
    monkeypatch.setitem(_timing.EVICT_BYTES, "cpu", 1 << 12)
    monkeypatch.setattr(
        _timing, "samples", lambda calls, device, seconds: {name: [1e-4] for name in calls if not calls[name]()}
    )
    _timing._buffer.cache_clear()
    yield
    _timing._buffer.cache_clear()


def bench(*arguments: str):
    return CliRunner().invoke(ops.main, ["--device", "cpu", *arguments])


def test_a_line_per_backend():
    result = bench("--op", "silu_mul", "--op", "rms_norm")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()[1:]
    assert len(lines) == 4
    assert all(LINE.fullmatch(line) for line in lines), lines


def test_json_rows_say_where_they_come_from():
    result = bench("--op", "compact_kv", "--backend", "cpu", "--json")
    row = json.loads(result.output)
    assert row["backend"] == "cpu"
    assert {"op", "shape", "dtype", "us", "gb_per_s", "percent_of_limit", "times_reference"} <= row.keys()
    assert {"device", "threads", "torch", "commit", "date", "bandwidth_gb_per_s"} <= row.keys()


def test_a_wrong_result_gets_no_time(monkeypatch):
    right = ops.call

    def call(op, variant, device, work):
        return (lambda: work.outputs[0].fill_(0.5)) if variant == "cpu" else right(op, variant, device, work)

    monkeypatch.setattr(ops, "call", call)
    result = bench("--op", "silu_mul")
    assert result.exit_code == 1
    assert "cpu: FAILED its check: output 0 is off by" in result.output
    assert len([line for line in result.output.splitlines() if LINE.fullmatch(line)]) == 1


def test_an_unknown_shape_is_a_usage_error():
    result = bench("--shape", "nothing")
    assert result.exit_code == 2
    assert "no case on cpu has that op and shape" in result.output


@pytest.mark.parametrize("op", sorted({op for op, *_ in ops.CASES}))
def test_bytes_are_those_of_the_tensors(op):
    """A case moves at most every byte of its tensors twice, and is not empty."""
    dims = next(case[4] for case in ops.CASES if case[0] == op and "cpu" in case[2])
    work = getattr(ops.Maker("cpu", torch.bfloat16), op)(**dims)
    tensors = [t for t in torch.utils._pytree.tree_leaves(work.arguments) if isinstance(t, torch.Tensor)]
    assert 0 < work.bytes <= 2 * sum(map(ops.storage, tensors))
