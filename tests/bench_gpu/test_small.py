"""The small cases: right by the reference, and what is wrong or changes is found."""

from __future__ import annotations

from bench import ops
from bench.gpu import small


def test_small_cases_agree_with_the_reference():
    assert not [case for case in small.CASES[5:] if small.failure(*case, device="cpu", backend="reference")]


def test_a_kernel_that_is_wrong_or_changes_is_found(monkeypatch):
    case = ("silu_mul", "fp32", {"rows": 2, "ffn": 8})
    right, noise = ops.call, iter(range(1, 100))

    def call(op, variant, device, work):
        run = right(op, "reference", device, work)
        return run if variant == "reference" else lambda: (run(), work.outputs[0].mul_(factor()))

    monkeypatch.setattr(ops, "call", call)
    factor = lambda: 2.0  # noqa: E731
    assert "output 0 is off by" in small.failure(*case, device="cpu", backend="cpu")
    factor = lambda: 1 + 1e-6 * next(noise)  # noqa: E731
    assert small.failure(*case, device="cpu", backend="cpu") == "two launches differ"
    assert "5 of 5 launches" in small.unstable(*case, device="cpu", backend="cpu", repeats=5)


def test_small_cases_are_told_one_by_one(monkeypatch, capsys):
    cases = [("silu_mul", "fp32", {"rows": 2, "ffn": 8}), ("rms_norm", "fp32", {"rows": 2, "hidden": 8})]
    monkeypatch.setattr(small, "CASES", cases)
    monkeypatch.setattr(small, "failure", lambda op, *_, **__: "wrong" if op == "rms_norm" else "")
    assert small.main() == 1
    assert capsys.readouterr().out.splitlines() == [
        "1 of 2: silu_mul fp32 rows=2 ffn=8: right",
        "2 of 2: rms_norm fp32 rows=2 hidden=8: wrong",
        "1 of 2 cases are right",
    ]
