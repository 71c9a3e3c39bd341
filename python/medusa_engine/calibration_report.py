"""A calibration for people: a table, and the cost and the speed of a step against its nodes as a PNG."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .calibration import Calibration

BUSY = 0.25  # a spread of times above which the choice is worth repeating


def points(found: Calibration, batch: int) -> list[dict]:
    """One row per measured node count: nodes, step_seconds, cost (in steps of the root alone), tokens_per_step,
    tokens_per_second of the whole batch, speedup (both expected), and whether it is the chosen one.
    """
    curve = found.curves[batch]
    return [
        {
            "nodes": nodes,
            "step_seconds": seconds,
            "cost": seconds / curve.seconds(1),
            "tokens_per_step": found.tokens_per_step[nodes - 1],
            "tokens_per_second": batch * found.tokens_per_step[nodes - 1] / seconds,
            "speedup": found.speedup(batch, nodes),
            "chosen": nodes == found.nodes(batch),
        }
        for nodes, seconds in curve.step_seconds.items()
        if nodes <= len(found.tokens_per_step)
    ]


def as_dict(found: Calibration) -> dict:
    """For --json: what was measured, and for each batch size the chosen tree, the expected speedup and the points."""
    batches = {
        batch: {
            "context": curve.context,
            "rounds": curve.rounds,
            "spread": curve.spread,
            "tree_nodes": found.nodes(batch),
            "tree": found.tree(batch).choices,
            "speedup": found.speedup(batch, found.nodes(batch)),
            "points": points(found, batch),
        }
        for batch, curve in found.curves.items()
    }
    names = ("accuracy", "temperatures", "log_loss", "tokens_per_step")
    return {**found.about, **{name: getattr(found, name) for name in names}, "batches": batches}


def table(found: Calibration) -> str:
    about = found.about
    lines = [
        f"{about['model']} on {about['machine']}, {about['backend']} {about['dtype']}; heads judged on "
        f"{about['conversations']} answers, {about['positions']} tokens ({about['prompts']})",
        "",
        "head   top-1   top-5   temperature   log loss, as it is -> at the temperature",
    ]
    rows = zip(found.accuracy, found.temperatures, found.log_loss, strict=True)
    for head, (accuracy, temperature, (before, after)) in enumerate(rows, start=1):
        lines.append(
            f"{head:4}{accuracy[0]:8.3f}{sum(accuracy[:5]):8.3f}{temperature:14.2f}{before:11.3f} -> {after:.3f}"
        )
    for batch, curve in sorted(found.curves.items()):
        chosen = found.nodes(batch)
        lines += ["", f"batch {batch}, context {curve.context}, medians of {curve.rounds}", _HEADER]
        for p in points(found, batch):
            lines.append(
                f"{p['nodes']:5}{p['step_seconds'] * 1e3:10.2f}{p['cost']:7.2f}{p['tokens_per_step']:13.3f}"
                f"{p['tokens_per_second']:10.1f}{p['speedup']:8.2f}x{'  <- chosen' if p['chosen'] else ''}"
            )
        what = "the root alone, plain decoding" if chosen == 1 else f"{chosen} nodes {found.tree(batch).choices}"
        lines.append(f"tree: {what}; expected speedup {found.speedup(batch, chosen):.2f}x over plain decoding")
        if curve.spread > BUSY:
            lines.append(f"the times vary by {curve.spread:.0%}: the machine was busy; calibrate when it is quiet")
    return "\n".join(lines)


_HEADER = "nodes   step, ms   cost  tokens/step  tokens/s  speedup"


def has_matplotlib(*, required: bool) -> bool:
    """Whether `plot` can draw. Raises ValueError if it must and cannot."""
    found = importlib.util.find_spec("matplotlib") is not None
    if required and not found:
        raise ValueError("the curves as PNG need `pip install 'medusa-kernels[bench]'`")
    return found


def plot(found: Calibration, path: Path) -> None:
    """Two curves per batch size against the nodes: the step's time, and the expected tokens per second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    cost, speed = figure.subplots(1, 2)
    for batch in sorted(found.curves):
        rows = points(found, batch)
        nodes = [p["nodes"] for p in rows]
        (line,) = cost.plot(nodes, [1e3 * p["step_seconds"] for p in rows], marker=".", label=f"batch {batch}")
        speed.plot(nodes, [p["tokens_per_second"] for p in rows], marker=".", color=line.get_color())
        best = next(p for p in rows if p["chosen"])
        label = f"batch {batch}: {best['nodes']} nodes, {best['speedup']:.2f}x"
        speed.plot(best["nodes"], best["tokens_per_second"], "o", color=line.get_color(), label=label)
    cost.set(xlabel="nodes of the tree", ylabel="time of a step, ms", ylim=(0, None), title="What a step costs")
    speed.set(xlabel="nodes of the tree", ylabel="expected tokens/s", ylim=(0, None), title="What it brings")
    for axes in (cost, speed):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(alpha=0.3)
        axes.legend()
    about = found.about
    figure.suptitle(f"{about['model']}, {about['machine']}, {about['backend']} {about['dtype']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
