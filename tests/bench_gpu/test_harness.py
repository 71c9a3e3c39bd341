"""Cases and workers: whatever fails, dies or hangs costs itself alone."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from bench.gpu import harness
from tests.bench_gpu.tiny import rows_of


def test_a_failing_case_costs_only_itself(options, tmp_path, capsys):
    def fails():
        yield {"benchmark": "kernel", "us": 1.0}
        raise ValueError("no such thing")

    listed = [harness.Case("bad", fails), harness.Case("good", lambda: [{"benchmark": "kernel", "us": 2.0}])]
    record = harness.Recorder(options.rows, "kernels", {"device": "none"})
    assert harness.work(listed, record, tmp_path / "progress", skip=0, deadline=options.deadline) == 0
    rows = rows_of(options.rows)
    assert [row["case"] for row in rows] == ["bad", "bad", "good"]
    assert rows[1]["error"] == "ValueError: no such thing"
    assert all(row["phase"] == "kernels" and row["device"] == "none" for row in rows)
    assert "good: us=2" in capsys.readouterr().out


def test_no_case_begins_after_the_deadline(options, tmp_path):
    listed = [harness.Case(name, lambda: [{"benchmark": "check"}]) for name in "ab"]
    record = harness.Recorder(options.rows, "quick", {})
    harness.work(listed, record, tmp_path / "progress", skip=0, deadline=time.time() - 1)
    (row,) = rows_of(options.rows)
    assert (row["benchmark"], row["reason"]) == ("skipped", "out of time, with 2 cases left")


def stand_in(progress: Path, ran: Path, in_case_1: str) -> str:
    """The script of a worker of 3 cases that notes in `ran` which ones it began, and does `in_case_1` in case 1."""
    return (
        "import os, pathlib, sys, time\n"
        f"progress, ran = pathlib.Path({str(progress)!r}), open({str(ran)!r}, 'a')\n"
        "for i in range(int(sys.argv[1]), 3):\n"
        "    progress.write_text(f'{i} case {i}'); ran.write(str(i)); ran.flush()\n"
        f"    if i == 1: {in_case_1}\n"
    )


def test_another_worker_goes_on_behind_the_case_that_killed_the_last(options, tmp_path):
    progress, ran = tmp_path / "progress", tmp_path / "ran"
    script = stand_in(progress, ran, "os.abort()")
    record = harness.Recorder(options.rows, "kernels", {})
    harness.run_phase(
        lambda skip: [sys.executable, "-c", script, str(skip)], record, progress,
        deadline=options.deadline, case_seconds=60,
    )  # fmt: skip
    assert ran.read_text() == "012"
    (row,) = rows_of(options.rows)
    assert (row["case"], row["error"]) == ("case 1", "the process died with -6")


def test_a_case_that_hangs_costs_only_itself(options, tmp_path):
    progress, ran = tmp_path / "progress", tmp_path / "ran"
    script = stand_in(progress, ran, "time.sleep(60)")
    harness.run_phase(
        lambda skip: [sys.executable, "-c", script, str(skip)], harness.Recorder(options.rows, "kernels", {}),
        progress, deadline=options.deadline, case_seconds=1,
    )  # fmt: skip
    assert ran.read_text() == "012"
    (row,) = rows_of(options.rows)
    assert (row["case"], row["error"]) == ("case 1", "did not end within 1 s; the process was killed")


def test_a_worker_that_never_begins_is_not_tried_again(options, tmp_path):
    record = harness.Recorder(options.rows, "kernels", {})
    harness.run_phase(
        lambda skip: [sys.executable, "-c", "raise SystemExit(3)"], record, tmp_path / "p",
        deadline=time.time() + 9, case_seconds=60,
    )  # fmt: skip
    (row,) = rows_of(options.rows)
    assert row["error"] == "the worker ended with 3 before its first case"


def test_a_command_and_its_children_end_at_the_deadline(tmp_path):
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(alive)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert harness.run_until([sys.executable, "-c", parent], time.time() + 1) is None
    time.sleep(2.2)
    assert not alive.exists()
