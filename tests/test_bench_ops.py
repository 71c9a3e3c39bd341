"""bench.ops: its line, its JSON, and that a wrong result gets no time."""

from __future__ import annotations

import json
import re

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from bench import _timing, ops
from bench.gpu import small

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


def test_evicting_reads_all_of_its_buffer_and_writes_none():
    buffer, result = _timing._buffer("cpu")
    written, place = buffer._version, result.data_ptr()
    _timing.evict("cpu")
    assert result.item() == buffer.numel() == _timing.EVICT_BYTES["cpu"] // 4
    assert (buffer._version, result.data_ptr()) == (written, place)


class TestFailure:
    """How far off an output may be."""

    @pytest.mark.parametrize("case", [case for case in small.CASES if case[0] == "draft_heads"], ids=str)
    @pytest.mark.parametrize("inside", [False, True], ids=["activations rounded", "rounded everywhere"])
    def test_fp32_logprobs_of_rounded_rows_pass(self, case, inside):
        """The heads as a GPU may compute them: from rows in the activations' dtype."""
        op, storage, dims = case
        work, _ = small.works(op, storage, dims, "cpu")
        dtype = ops.DTYPES[storage]
        hidden, blocks, _, lm_head, _, top_k, _, logprobs = work.arguments

        def run():
            exact = dtype if inside else torch.float32
            x = hidden.to(exact).expand(len(blocks), *hidden.shape)
            for layer in range(blocks.shape[1]):
                x = (x + F.silu(x @ blocks[:, layer].to(exact).mT)).to(dtype).to(exact)
            scores = (x @ lm_head.to(exact).mT).float().log_softmax(-1)
            logprobs.copy_(scores.topk(top_k).values.transpose(0, 1))

        reference = ops.call(op, "reference", "cpu", work)
        assert ops.failure(work, run, reference, dtype) == ""
        wrong = lambda: (run(), logprobs.mul_(1.05))  # noqa: E731
        assert "output 0 is off by 0.0" in ops.failure(work, wrong, reference, dtype)

    def test_fp32_activations_leave_an_fp32_limit(self):
        work = ops.Maker("cpu", torch.bfloat16).linear(rows=2, inputs=8, outputs=4)
        assert ops.tolerance(work, torch.float32, torch.bfloat16) == ops.TOLERANCE[torch.float32]
        assert ops.tolerance(work, torch.float32, torch.int8) == ops.TOLERANCE[torch.int8]

    def test_moved_rows_are_exact_and_never_held_in_fp64(self, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "double", lambda self: pytest.fail("a cache in fp64"))
        work = ops.Maker("cpu", torch.bfloat16).compact_kv(layers=2, kv_heads=1, head_dim=8, moved=2, prefix=4)
        (cache,) = work.outputs
        reference = ops.call("compact_kv", "reference", "cpu", work)
        assert ops.failure(work, reference, reference, torch.bfloat16) == ""

        def run():
            reference()
            cache[1, 0, 0, 5, 0, 3] *= 1 + 2**-7  # bf16's next number

        assert ops.failure(work, run, reference, torch.bfloat16) == f"output 0 differs in 1 of {cache.numel()} places"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
    def test_an_error_is_found_in_any_part(self, dtype, monkeypatch):
        parts = ops._parts
        monkeypatch.setattr(ops, "_parts", lambda *tensors: parts(*tensors, size=7))
        work = ops.Maker("cpu", torch.float32).silu_mul(rows=3, ffn=10)
        (out,) = work.outputs
        reference = ops.call("silu_mul", "reference", "cpu", work)
        assert ops.failure(work, reference, reference, dtype) == ""
        for at in (0, 13, 29):
            for wrong, said in ((100.0, "off by "), (torch.nan, "off by nan")):

                def run(at=at, wrong=wrong):
                    reference()
                    out.view(-1)[at] = wrong

                assert said in ops.failure(work, run, reference, dtype)


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
