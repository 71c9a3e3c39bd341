"""Our engine beside those a user would pick instead: `python -m bench.peers --help`.

The same model, prompts, chat template, number of new tokens and threads; greedy; prompt by prompt in turn (A B C A B
C), each engine in its own process and only one of them at work. Speeds are decode tokens per second without the
prefill, medians over the prompts; a ratio is the median of the prompts' own ratios. What is not installed is skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from bench.peer_engines import CONTESTANTS, PEERS, Contestant, Reply, Spec
from medusa_engine.benchmark import append_row, load_prompts, where
from medusa_engine.checkpoint import open_checkpoint
from medusa_engine.cli_options import parse_tree

ROOT = Path(__file__).resolve().parent.parent
WARM_UP_TOKENS = 8


class PeerError(Exception):
    """An engine that cannot take part, or no longer: one line that says why."""


class Worker:
    """A contestant's process."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, **environment},
            text=True,
            encoding="utf-8",
        )

    @classmethod
    def of(cls, spec: Spec) -> Worker:
        return cls([sys.executable, "-m", "bench.peer_engines", spec.dumps()], spec.environment())

    def ready(self) -> Reply:
        """What the engine says of itself, once it is loaded. Raises PeerError if it is not there."""
        return self._reply()["ready"]

    def decode(self, ids: Sequence[int], max_new_tokens: int) -> Reply:
        """Raises PeerError for a worker that failed, or answered with another number of tokens."""
        request = json.dumps({"ids": list(ids), "max_new_tokens": max_new_tokens})
        with contextlib.suppress(BrokenPipeError):  # a dead process: the missing reply says so
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        reply = self._reply()
        if len(reply["tokens"]) != max_new_tokens:
            raise PeerError(f"gave {len(reply['tokens'])} tokens, not {max_new_tokens}")
        return reply

    def _reply(self) -> Reply:
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"its process ended with exit code {self._process.wait()}")
        reply = json.loads(line)
        for problem in ("missing", "failed"):
            if problem in reply:
                raise PeerError(reply[problem])
        return reply

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@dataclass
class Result:
    """What a contestant did, prompt by prompt."""

    contestant: Contestant
    about: Reply
    replies: list[Reply] = field(default_factory=list)

    @property
    def speeds(self) -> list[float]:
        """Tokens per second; the prefill's token is not among them."""
        return [(len(r["tokens"]) - 1) / r["decode_seconds"] for r in self.replies]

    @property
    def median(self) -> float:
        return statistics.median(self.speeds)

    def over(self, other: Result) -> float:
        return statistics.median(a / b for a, b in zip(self.speeds, other.speeds, strict=True))

    def tokens_per_step(self) -> float | None:
        if "steps" not in self.replies[0]:
            return None
        return sum(len(r["tokens"]) - 1 for r in self.replies) / sum(r["steps"] for r in self.replies)

    def agreement(self, reference: Result) -> float:
        """Mean share of a text that comes before its first token unlike the reference's."""
        pairs = [(a["tokens"], b["tokens"]) for a, b in zip(self.replies, reference.replies, strict=True)]
        return statistics.mean(_common_prefix(a, b) / len(b) for a, b in pairs)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def compete(
    start: Callable[[Contestant], Worker],
    contestants: Sequence[Contestant],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[Result]:
    """Every prompt through every contestant in turn, the fastest result first.

    One that fails drops out with a line on stderr, and has no result.
    """
    workers: dict[Contestant, Worker] = {}
    results: dict[Contestant, Result] = {}

    def drop(contestant: Contestant, reason: PeerError) -> None:
        tqdm.write(f"{contestant.name}: skipped: {reason}", file=sys.stderr)
        results.pop(contestant, None)

    with contextlib.ExitStack() as processes:
        for contestant in tqdm(contestants, desc="engines", disable=None):  # loaded one after another, too
            workers[contestant] = start(contestant)
            processes.callback(workers[contestant].close)
            try:
                results[contestant] = Result(contestant, workers[contestant].ready())
                workers[contestant].decode(prompts[0], WARM_UP_TOKENS)
            except PeerError as reason:
                drop(contestant, reason)
        for ids in tqdm(prompts, desc="prompts", disable=None):
            for contestant, result in list(results.items()):
                try:
                    result.replies.append(workers[contestant].decode(ids, max_new_tokens))
                except PeerError as reason:
                    drop(contestant, reason)
    return sorted(results.values(), key=lambda r: -r.median)


def best_peer(results: Sequence[Result], bits: int | None = None) -> Result | None:
    """The fastest engine that is not ours, among those of one width or all."""
    peers = [r for r in results if not r.contestant.is_ours and bits in (None, r.contestant.bits)]
    return max(peers, key=lambda r: r.median, default=None)


def rows(results: Sequence[Result], *, prompt_set: str, max_new_tokens: int, threads: int) -> list[dict]:
    """A results row per contestant, in the results' order."""
    environment = {**where(torch.device("cpu")), "threads": threads}
    plain = next((r for r in results if r.contestant.name == "ours plain bfloat16"), None)
    made = []
    for result in results:
        c, same = result.contestant, best_peer(results, result.contestant.bits)
        speeds = result.speeds
        quartiles = statistics.quantiles(speeds, n=4, method="inclusive")[::2] if len(speeds) > 1 else speeds * 2
        made.append(
            {
                "benchmark": "peers",
                "engine": c.engine,
                "mode": c.mode,
                "precision": c.precision,
                "bits": c.bits,
                "engine_version": result.about["version"],
                "tree_nodes": result.about.get("tree_nodes"),
                "prompts": prompt_set,
                "num_prompts": len(speeds),
                "max_new_tokens": max_new_tokens,
                "tokens_per_second": result.median,
                "tokens_per_second_quartiles": quartiles,
                "tokens_per_step": result.tokens_per_step(),
                "best_peer_of_same_bits": same.contestant.name if same else None,
                "times_best_peer_of_same_bits": result.over(same) if same else None,
                "agreement_with_our_plain_bfloat16": result.agreement(plain) if plain else None,
                **environment,
            }
        )
    return made


def table(made: Sequence[dict]) -> str:
    """The rows as text, fastest first."""
    header = ("engine", "mode", "weights", "tokens/s", "quartiles", "tokens/step", "x best same-bit peer", "same text")
    lines = [header]
    for row in made:
        low, high = row["tokens_per_second_quartiles"]
        same = row["agreement_with_our_plain_bfloat16"]
        lines.append(
            (
                row["engine"],
                row["mode"],
                row["precision"],
                f"{row['tokens_per_second']:.1f}",
                f"{low:.1f}-{high:.1f}",
                _number(row["tokens_per_step"]),
                _number(row["times_best_peer_of_same_bits"]),
                "" if same is None else f"{same:.0%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def headlines(results: Sequence[Result]) -> list[str]:
    """Ours over the best peer of the same width, and over the fastest peer of any."""
    lines = []
    for ours in (r for r in results if r.contestant.is_ours):
        bits = ours.contestant.bits
        for label, rival in ((f"best {bits}-bit peer", best_peer(results, bits)), ("best peer", best_peer(results))):
            if rival is not None:
                ratio = f"{ours.over(rival):.2f}x the {label}, {rival.contestant.name}"
                lines.append(f"{ours.contestant.name}: {ratio}")
    return lines


def chart(made: Sequence[dict], path: Path) -> None:
    """Bars of tokens per second with quartiles, fastest on top, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {32: "#9aa0a6", 16: "#4c78a8", 8: "#f58518", 4: "#54a24b"}
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.38 * len(made)), layout="constrained")
    for at, row in enumerate(reversed(made)):
        speed, (low, high) = row["tokens_per_second"], row["tokens_per_second_quartiles"]
        ours = row["engine"] == "ours"
        axes.barh(at, speed, color=colours[row["bits"]], alpha=1.0 if ours else 0.55)
        axes.errorbar(speed, at, xerr=[[max(0, speed - low)], [max(0, high - speed)]], color="black", lw=1, capsize=2)
        axes.text(high, at, f"  {speed:.0f}", va="center", fontsize=8, fontweight="bold" if ours else None)
    axes.set_yticks(range(len(made)), [f"{r['engine']} {r['mode']} {r['precision']}" for r in reversed(made)])
    for bits in sorted({row["bits"] for row in made}, reverse=True):
        axes.barh(0, 0, color=colours[bits], label=f"{bits}-bit weights")
    axes.legend(loc="lower right", fontsize=8)
    first = made[0]
    axes.set_xlabel(f"decode tokens/s, median of {first['num_prompts']} prompts x {first['max_new_tokens']} new tokens")
    axes.set_title(f"SmolLM2-135M, {first['device']}, {first['threads']} threads", fontsize=10)
    axes.margins(x=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def peer_list(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"no peer {unknown[0]!r}; there are {', '.join(PEERS)}")
    if not names:
        raise argparse.ArgumentTypeError(f"names no peer; there are {', '.join(PEERS)}")
    return names


def positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", default="chat", help="chat, humaneval or a text file")
    parser.add_argument("--limit", type=positive, default=20, help="prompts at most")
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peers", type=peer_list, default=PEERS, help=f"some of {','.join(PEERS)}")
    parser.add_argument("--precisions", help="some of the precisions, say BF16,Q8_0,int8; default: all")
    parser.add_argument(
        "--tree", type=parse_tree, default="auto", help="our Medusa's tree: auto, a number of nodes or a name"
    )
    parser.add_argument("--output", type=Path, help="append a results row per engine and precision to this JSONL file")
    parser.add_argument("--chart", type=Path, help="write the bar chart to this PNG")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 2:
        parser.error("--max-new-tokens must be at least 2: the first token comes from the prefill")
    wanted = None if args.precisions is None else set(args.precisions.split(","))
    known = {c.precision for c in CONTESTANTS}
    if wanted is not None and (unknown := sorted(wanted - known)):
        parser.error(f"--precisions: no precision {unknown[0]!r}; there are {', '.join(sorted(known))}")
    args.contestants = [
        c for c in CONTESTANTS if c.engine in args.peers and (wanted is None or c.precision in wanted)
    ]  # fmt: skip
    if not args.contestants:
        parser.error("no engine among --peers has one of those --precisions")
    try:
        args.texts = load_prompts(args.prompts)[: args.limit]
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    tokenizer = open_checkpoint("default").tokenizer
    prompts = [tokenizer.encode_prompt(text) for text in args.texts]
    context = -(-(max(map(len, prompts)) + args.max_new_tokens) // 256) * 256
    results = compete(
        lambda contestant: Worker.of(Spec(contestant, args.threads, context, args.tree)),
        args.contestants,
        prompts,
        args.max_new_tokens,
    )
    if not results:
        sys.exit("no engine could run; see the lines above")
    made = rows(results, prompt_set=args.prompts, max_new_tokens=args.max_new_tokens, threads=args.threads)
    print(table(made))
    print("\n".join(headlines(results)))
    if args.output:
        for row in made:
            append_row(args.output, row)
    if args.chart:
        chart(made, args.chart)


if __name__ == "__main__":
    main()
