"""A phase is a list of cases. A worker process runs them and writes rows; its parent starts another behind the case
that a worker died in."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from medusa_engine.benchmark import append_row

GRACE = 20  # seconds that the case under way at the deadline may take to finish


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[], Iterable[dict]]


@dataclass(frozen=True)
class Options:
    """What a phase may want to know."""

    rows: Path  # JSON lines
    logs: Path  # folder of what tests, sanitizers and the profiler write
    deadline: float  # time.time() after which no case begins
    model: str | None = None
    heads: str | None = None
    commit: str | None = None

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()


class Recorder:
    """Appends rows to the results, each with its phase, its case (a row may name one of its own) and where it was
    measured."""

    def __init__(self, path: Path, phase: str, where: dict):
        self.path, self.phase, self.where = path, phase, where

    def __call__(self, case: str, row: dict) -> None:
        row = {"phase": self.phase, "case": case, **row}
        append_row(self.path, row | self.where)
        print(f"  {row['case']}: {summary(row)}", flush=True)

    def failed(self, case: str, error: str) -> None:
        self(case, {"benchmark": "failure", "error": error})


def summary(row: dict) -> str:
    """The row's scalars, for a log."""
    known = ("phase", "case", "benchmark")
    shown = {name: value for name, value in row.items() if name not in known and not isinstance(value, dict | list)}
    return " ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in
                    shown.items())  # fmt: skip


def work(cases: Sequence[Case], record: Recorder, progress: Path, *, skip: int, deadline: float) -> int:
    """Runs the cases from number `skip` on. 0, or 1 if the CUDA context broke and the rest needs another process."""
    for number, case in enumerate(cases):
        if number < skip:
            continue
        if time.time() > deadline:
            record(case.name, {"benchmark": "skipped", "reason": f"out of time, with {len(cases) - number} cases left"})
            return 0
        progress.write_text(f"{number} {case.name}")
        try:
            for row in case.run():
                record(case.name, row)
        except Exception as error:
            traceback.print_exc()
            record.failed(case.name, f"{type(error).__name__}: {str(error).strip()[:400]}")
            if not context_lives():
                return 1
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


def context_lives() -> bool:
    """Whether CUDA still answers: an illegal access or a failed assertion ends the context for good."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def run_phase(
    command: Callable[[int], list[str]], record: Recorder, progress: Path, *, deadline: float, case_seconds: float
) -> None:
    """Starts workers until every case was tried once: `command(skip)` runs the cases from number `skip` on. A case that
    takes longer than `case_seconds` hangs, and costs only itself.
    """
    skip = 0
    while time.time() < deadline:
        progress.unlink(missing_ok=True)

        def hangs() -> bool:
            with contextlib.suppress(FileNotFoundError):  # before the first case
                return time.time() - progress.stat().st_mtime > case_seconds
            return False

        code = run_until(command(skip), deadline + GRACE, hangs=hangs)
        if code == 0:
            return
        if not progress.exists():
            record.failed("start", f"the worker ended with {code} before its first case")
            return
        number, name = progress.read_text().split(maxsplit=1)
        if code is None:
            late = time.time() >= deadline + GRACE
            limit = "before its phase's time was up" if late else f"within {case_seconds:.0f} s"
            record.failed(name, f"did not end {limit}; the process was killed")
        elif code != 1:
            record.failed(name, f"the process died with {code}")
        skip = int(number) + 1


def run_until(
    command: list[str],
    deadline: float,
    *,
    log: Path | None = None,
    env: dict | None = None,
    hangs: Callable[[], bool] = lambda: False,
) -> int | None:
    """The command's exit status, or None if it and all it started had to be killed: at `deadline`, or when it hangs."""
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("w")) if log else None
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT if log else None,
            env=None if env is None else os.environ | env,
            start_new_session=True,
        )
        end = max(deadline, time.time() + 1)
        with ended(process):
            while (left := end - time.time()) > 0 and not hangs():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(min(left, 1))
            return None


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
    """Nothing of the process's session outlives the block."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]
