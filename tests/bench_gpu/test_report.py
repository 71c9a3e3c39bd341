"""The table that is printed last says what the rows say."""

from __future__ import annotations

from bench.gpu.report import report


def test_the_table_says_what_the_rows_say():
    step = {"benchmark": "step", "model": "vicuna-7b", "batch": 1, "context": 512, "step_us": 4000.0}
    rows = [
        {
            "benchmark": "kernel",
            "case": "attention a",
            "implementation": name,
            "op": "tree_attention",
            "us": us,
            "percent_of_floor": 81.4,
            "floor_us": 8.14,
        }
        for name, us in (("cuda", 10.0), ("sdpa", 25.0))
    ]
    rows += [
        {"benchmark": "kernel", "case": "attention a", "implementation": "flex", "failed": "no compiler"},
        step | {"decoding": "torch.compile", "tokens_per_second": 250.0},
        step | {"decoding": "medusa-1, acceptance replayed", "tokens_per_second": 641.0, "overhead": 1.14,
                "speedup": 2.25, "times_floor": 1.2, "times_weight_floor": 1.3, "engine_step_us": 4100.0,
                "own_lm_heads": True},
        {"benchmark": "check", "case": "memcheck", "passed": False, "detail": "3 errors"},
        {"benchmark": "check", "case": "tests on cuda", "passed": True, "passed_tests": 7, "failed_tests": 0},
        {"benchmark": "failure", "case": "trace", "error": "OutOfMemoryError"},
    ]  # fmt: skip
    rows += [
        {"benchmark": "kernel", "case": f"linear vicuna-7b {name} r64", "op": "linear", "us": us, "implementation": by,
         "percent_of_floor": 50.0, "floor_us": us / 2}
        for name in ("qkv", "down") for by, us in (("cuda", 40.0), ("torch", 30.0))
    ]  # fmt: skip
    rows.append(rows[0] | {"case": "attention b", "implementation": "triton"})
    text = report(rows)
    assert "attention b by triton                         10.0 us   81% | \n" in text
    assert "10.0 us   81% | sdpa 2.50x" in text
    assert "linear vicuna-7b r64, 2 matrices              80.0 us   50% | torch 0.75x" in text
    assert "attention a flex: no compiler" in text
    assert "641 tok/s | 1.30x weights 1.20x floor | engine 4.10 ms | overhead 1.14 speedup 2.25" in text
    assert "acceptance replayed (own LM heads)" in text
    assert "checks: 1 of 2 passed" in text
    assert "WRONG memcheck: 3 errors" in text
    assert "tests on cuda: 7 passed, 0 failed" in text
    assert "trace: OutOfMemoryError" in text
