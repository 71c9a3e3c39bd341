"""One phase's cases in a process of their own: started by `bench.gpu`, not by hand."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from medusa_engine.benchmark import where

from .harness import Options, Recorder, work
from .phases import PHASES


def arguments(options: Options, phase: str, progress: Path, skip: int) -> list[str]:
    """What `main` reads, from what the parent knows."""
    given = {
        "--rows": options.rows,
        "--logs": options.logs,
        "--deadline": options.deadline,
        "--progress": progress,
        "--skip": skip,
    }
    given |= {"--model": options.model, "--heads": options.heads, "--commit": options.commit}
    return [phase, *(f"{name}={value}" for name, value in given.items() if value is not None)]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("phase", choices=PHASES)
    for name in ("--rows", "--logs", "--progress"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--deadline", type=float)
    parser.add_argument("--skip", type=int)
    for name in ("--model", "--heads", "--commit"):
        parser.add_argument(name)
    a = parser.parse_args(argv)
    options = Options(a.rows, a.logs, a.deadline, a.model, a.heads, a.commit)
    record = Recorder(a.rows, a.phase, measured(a.commit))
    return work(PHASES[a.phase].cases(options), record, a.progress, skip=a.skip, deadline=a.deadline)


def measured(commit: str | None) -> dict:
    """Where and with what, the commit as given where the copy measured is no checkout."""
    found = where(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return found | {"commit": commit or found["commit"]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
