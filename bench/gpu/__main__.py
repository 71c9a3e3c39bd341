"""`python -m bench.gpu [--budget SECONDS] [--only PHASE,...] [--model PATH] [--out FOLDER]`: see `--help`."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
import torch

from .harness import Options, Recorder, python, run_phase
from .phases import BUDGET, PHASES, named
from .report import report
from .worker import arguments, measured

ROOT = Path(__file__).resolve().parents[2]
RESULTS, LOGS = ROOT / "bench" / "results", ROOT / "build" / "gpu"


@click.command()
@click.option("--budget", default=BUDGET, show_default=True, help="Seconds for everything since --began.")
@click.option("--began", type=float, help="The start of the budget, in seconds since 1970. Default: now.")
@click.option("--only", default=",".join(PHASES), show_default=True, help="Phases or groups of them, in this order.")
@click.option("--model", help="A model's folder, for decoding with real weights. Default: that part is skipped.")
@click.option("--heads", help="The model's Medusa heads. Default: those shipped for SmolLM2-135M-Instruct.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False),
              help="Folder for the rows and logs. Default: $OUT if set, else bench/results and build/gpu.")  # fmt: skip
@click.option("--commit", help="What the rows say was measured. Default: the checkout's commit.")
def main(budget, began, only, model, heads, out, commit):
    """Checks, measures and compares everything that needs a GPU; prints a table last.

    One call does as much as there is time for, what matters most first. Everything takes three, each of less than ten
    minutes with its build; rows add up in one file:

    \b
        make gpu GPU="--only first"    right? whole steps, the ops that matter
        make gpu GPU="--only rivals"   other implementations, the other ops
        make gpu GPU="--only proof"    the tests and the sanitizers

    Example: python -m bench.gpu --only quick,kernels --budget 200
    """
    try:
        chosen = named(only)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if not torch.cuda.is_available():
        click.echo("no CUDA device here: the GPU's checks and benchmarks are skipped")
        return
    end = (began or time.time()) + budget
    given = out or Path(os.environ.get("OUT", ""))
    out, logs = (RESULTS, LOGS) if given == Path() else (given, given)
    for folder in (out, logs):
        folder.mkdir(parents=True, exist_ok=True)
    rows = out / f"{slug(torch.cuda.get_device_name())}.jsonl"
    before = rows.stat().st_size if rows.exists() else 0
    options = Options(rows, logs, end, model, heads, commit)
    run(chosen, options)
    with rows.open(encoding="utf-8") as file:
        file.seek(before)
        found = [json.loads(line) for line in file]
    click.echo(f"\n{len(found)} rows in {rows}, {budget - (end - time.time()):.0f} s\n\n{report(found)}")


def run(chosen: list[str], options: Options) -> None:
    """Each phase until its own time or that of all is up."""
    where = measured(options.commit)
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        for phase in chosen:
            deadline = min(options.deadline, time.time() + PHASES[phase].seconds)
            record = Recorder(options.rows, phase, where)
            click.echo(f"{phase}: {max(0, deadline - time.time()):.0f} s")
            if time.time() > deadline:
                record(phase, {"benchmark": "skipped", "reason": "out of time before it began"})
                continue

            mine = replace(options, deadline=deadline)

            def command(skip: int, phase: str = phase, mine: Options = mine) -> list[str]:
                return python("-m", "bench.gpu.worker", *arguments(mine, phase, progress, skip))

            run_phase(command, record, progress, deadline=deadline, case_seconds=PHASES[phase].case_seconds)


def slug(device: str) -> str:
    """A file name of a device's: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


if __name__ == "__main__":
    main()
