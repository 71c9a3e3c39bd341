"""What int8 costs in quality: `python -m bench.quality --help`.

Perplexity and greedy agreement of float32, bfloat16 and int8 on the cpu backend, over text that any machine has: the
source of modules of Python's standard library, and the prose of its docstrings. Every window starts from an empty
cache; the first token of a window predicts, but is not predicted. On the CPU a row does not depend on the rows beside
it, so reading the text in chunks gives the very logits that decoding it would.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from medusa_engine import Medusa
from medusa_engine.benchmark import append_row, where
from medusa_engine.model import Model
from medusa_engine.prefill import PREFILL_CHUNK, hidden_rows

DTYPES = ("float32", "bfloat16", "int8")
MODULES = {"code": ("heapq", "textwrap"), "prose": ("statistics", "unittest.mock")}
WINDOW = 1024
MOST_PERPLEXITY = 1.01  # of int8, relative to bfloat16's


@dataclass(frozen=True)
class Reading:
    """What a model made of a text.

    Attributes:
        nll: fp64 (windows, window - 1), -ln P of each token given those before it in its window.
        best: int64 of the same shape, the likeliest token at each place.
    """

    nll: Tensor
    best: Tensor

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll.mean())


def source(module: str) -> str:
    """A pure Python module's source. Raises ValueError if it has none."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise ValueError(f"module {module!r} has no Python source here")
    return Path(spec.origin).read_text(encoding="utf-8")


def docstrings(code: str) -> str:
    """The docstrings of a module, its classes and its functions, in the order of the file; examples are left out."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = (ast.get_docstring(node) for node in nodes)
    paragraphs = (p for text in found if text for p in inspect.cleandoc(text).split("\n\n"))
    return "\n\n".join(p for p in paragraphs if ">>>" not in p)


def texts(kind: str) -> list[str]:
    """A text per module."""
    return [docstrings(source(module)) if kind == "prose" else source(module) for module in MODULES[kind]]


def windows(ids: Sequence[int], number: int, size: int) -> Tensor:
    """The first `number` windows of `size` tokens, int32 (number, size). ValueError if there are not that many."""
    if len(ids) < number * size:
        raise ValueError(f"the text has {len(ids)} tokens; {number} windows of {size} need {number * size}")
    return torch.tensor(ids[: number * size], dtype=torch.int32).view(number, size)


def read(model: Model, rows: Tensor) -> Reading:
    """The model's reading of int32 (windows, size), window by window."""
    nll, best = zip(*(_read_window(model, row) for row in tqdm(rows, desc=model.dtype_name, disable=None)), strict=True)
    return Reading(torch.stack(nll), torch.stack(best))


def _read_window(model: Model, ids: Tensor) -> tuple[Tensor, Tensor]:
    losses, choices = [], []
    for logits, following in zip(read_logits(model, ids[:-1]), ids[1:].long().split(PREFILL_CHUNK), strict=True):
        losses.append(torch.nn.functional.cross_entropy(logits.double(), following, reduction="none"))
        choices.append(logits.argmax(-1))
    return torch.cat(losses), torch.cat(choices)


def read_logits(model: Model, ids: Tensor) -> Iterator[Tensor]:
    """The logits (rows, vocab) after each of int32 `ids` (length,), PREFILL_CHUNK rows at a time."""
    for hidden in hidden_rows(model, model.new_cache(1, len(ids)), ids):
        logits, head = model.head(hidden)
        head()
        yield logits


def compare(readings: dict[str, dict[str, Reading]]) -> list[dict]:
    """kind -> dtype -> reading: an entry per kind, and one for all text, with every dtype against the wider ones."""
    every = {**readings, "all": {d: _joined([r[d] for r in readings.values()]) for d in DTYPES}}
    entries = []
    for kind, of in every.items():
        for dtype in DTYPES:
            entry = {"text": kind, "dtype": dtype, "tokens": of[dtype].nll.numel(), "perplexity": of[dtype].perplexity}
            for other in DTYPES[: DTYPES.index(dtype)]:
                entry[f"perplexity_over_{other}"] = of[dtype].perplexity / of[other].perplexity
                entry[f"agreement_with_{other}"] = float((of[dtype].best == of[other].best).double().mean())
            entries.append(entry)
    return entries


def _joined(readings: Sequence[Reading]) -> Reading:
    return Reading(torch.cat([r.nll for r in readings]), torch.cat([r.best for r in readings]))


def table(entries: Sequence[dict]) -> str:
    lines = ["text   dtype     perplexity  over bf16  over fp32  agrees with bf16  agrees with fp32"]
    for e in entries:
        cells = [f"{e['text']:6} {e['dtype']:9} {e['perplexity']:10.4f}"]
        for what, form, width in (("perplexity_over", "{:+.2%}", 10), ("agreement_with", "{:.4f}", 17)):
            for other in ("bfloat16", "float32"):
                value = e.get(f"{what}_{other}")
                shown = "" if value is None else form.format(value - 1 if what == "perplexity_over" else value)
                cells.append(f"{shown:>{width}}")
        lines.append(" ".join(cells).rstrip())
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=2, help=f"windows of {WINDOW} tokens of each module")
    parser.add_argument("--output", type=Path, help="append the results row to this JSONL file")
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args(argv)
    if args.windows < 1:
        parser.error(f"--windows must be at least 1, not {args.windows}")
    bodies = {kind: texts(kind) for kind in MODULES}
    readings: dict[str, dict[str, Reading]] = {kind: {} for kind in MODULES}
    for dtype in DTYPES:
        engine = Medusa.from_pretrained(backend="cpu", dtype=dtype)
        for kind, listed in bodies.items():
            try:
                rows = [windows(engine.tokenizer.encode(body), args.windows, WINDOW) for body in listed]
            except ValueError as error:
                parser.error(f"--windows {args.windows}: {error}")
            readings[kind][dtype] = read(engine.model, torch.cat(rows))
        del engine
    entries = compare(readings)
    ratio = next(e["perplexity_over_bfloat16"] for e in entries if (e["text"], e["dtype"]) == ("all", "int8"))
    row = {
        "benchmark": "quality",
        "backend": "cpu",
        "window": WINDOW,
        "modules": MODULES,
        "sha256": {kind: hashlib.sha256("".join(listed).encode()).hexdigest() for kind, listed in bodies.items()},
        "int8_perplexity_over_bfloat16": ratio,
        "readings": entries,
        **where(torch.device("cpu")),
    }
    print(json.dumps(row) if args.as_json else table(entries))
    if args.output:
        append_row(args.output, row)
    if ratio > MOST_PERPLEXITY:
        sys.exit(f"int8's perplexity is {ratio - 1:+.2%} of bfloat16's; at most {MOST_PERPLEXITY - 1:+.0%} will do")


if __name__ == "__main__":
    main()
