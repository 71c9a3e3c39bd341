"""How near the CPU engine is to the machine's limits: `python -m bench.roofline --help`.

Four tables per dtype, for SmolLM2-135M: each op of a step, the whole step against the tree's nodes (drafting included),
the step while one core is busy with another job, and tokens per second against the context. What a step needs at the
least is in bench/step_parts.py; the machine's two speeds, memory's and that of PyTorch's fp32 matrix product, are
measured in turn with what they limit: memory shared with strangers is half as fast one minute as the next. Set
OMP_WAIT_POLICY=PASSIVE, or PyTorch's threads spin while ours work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from bench import ops, quality
from bench.step_parts import DTYPES, INT8_SPEED, Limits, Part, step_parts, totals
from medusa_engine import Medusa
from medusa_engine.benchmark import append_row, where
from medusa_engine.decode import Decoder
from medusa_engine.draft import MedusaDrafter
from medusa_engine.tree_choice import choose_tree
from medusa_kernels import Tree, pack_linear
from medusa_kernels._backends import _C

NODES = (1, 2, 4, 6, 8, 16, 32, 64)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
NEW_TOKENS = 64  # at the end of each context
STEPS_IN_TURN = 3
READ_BYTES = 256 << 20  # far more than the caches hold
PRODUCT = 1024  # rows and columns
BUSY_STEPS = 60  # in a row, beside a busy core and without


def rounds(calls: Mapping[object, Callable[[], object]], number: int, *, in_turn: int = 1) -> dict:
    """Seconds of every call, `number` times A A B B C C ...: in turn, so that a busy moment hits all of them.

    With several in turn the first is not timed: it finds the caches as another left them.
    """
    taken = {name: [] for name in calls}
    for done in tqdm(range(number + 1), desc="rounds", disable=None, leave=False):
        for name, call in calls.items():
            for turn in range(in_turn + (in_turn > 1)):
                start = time.perf_counter()
                call()
                seconds = time.perf_counter() - start
                if done and (turn or in_turn == 1):  # the first round warms up
                    taken[name].append(seconds)
    return taken


def medians(
    calls: Mapping[object, Callable[[], object]], number: int, *, in_turn: int = 1
) -> tuple[dict[object, float], Limits]:
    """Seconds of every call as `rounds` takes them, and the machine's limits in the same rounds."""
    data = torch.ones(READ_BYTES // 4)
    a, b, out = torch.randn(3, PRODUCT, PRODUCT)
    measures = {"read": data.sum, "product": lambda: torch.mm(a, b, out=out)}
    taken = rounds({**calls, **measures}, number, in_turn=in_turn)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    return seconds, Limits(READ_BYTES / seconds.pop("read"), 2 * PRODUCT**3 / seconds.pop("product"))


def part_call(part: Part, dtype: str) -> Callable[[], None]:
    """All of the part's calls in a step, each on weights and K/V of its own as in the model.

    Raises:
        ValueError: the op's result is not the reference's.
    """
    storage = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}[dtype]
    maker = ops.Maker("cpu", torch.int8 if dtype == "int8" and part.op == "linear" else storage)
    copies = part.calls if part.op in ("linear", "tree_attention", "rotary_append") else 1
    runs = []
    for copy in range(copies):
        work = getattr(maker, part.op)(**part.dims)
        if part.op == "draft_heads":
            x, blocks, bias, lm_head, *rest = work.arguments
            work.packed = (x, pack_linear(blocks, dtype), bias, pack_linear(lm_head, dtype), *rest)
        run = ops.call(part.op, "cpu", "cpu", work)
        # Top-k tokens of int8 weights are not those of the weights they come from: bench.quality judges these.
        if not copy and not (part.op == "draft_heads" and dtype == "int8"):
            reference = ops.call(part.op, "reference", "cpu", work)
            if problem := ops.failure(work, run, reference, maker.dtype):
                raise ValueError(f"{part.name} ({part.op}, {dtype}): {problem}")
        runs.append(run)

    def call() -> None:
        for at in range(part.calls):
            runs[at % copies]()

    return call


def op_table(parts: Sequence[Part], dtype: str, number: int) -> list[dict]:
    """A row per part: its bytes, operations, time and share of the limit, all of a whole step."""
    seconds, limits = medians({part.name: part_call(part, dtype) for part in parts}, number)
    return [
        {"part": part.name, "op": part.op, "calls": part.calls} | _measured([part], seconds[part.name], dtype, limits)
        for part in parts
    ]


def _measured(parts: Sequence[Part], seconds: float, dtype: str, limits: Limits) -> dict:
    size, operations = totals(parts)
    return {
        "bytes": size,
        "operations": operations,
        "us": seconds * 1e6,
        "gb_per_s": size / seconds / 1e9,
        "read_gb_per_s": limits.bandwidth / 1e9,
        "product_gflop_per_s": limits.speed / 1e9,
        "percent_of_limit": 100 * limits.seconds(parts, dtype) / seconds,
    }


def step_table(engine: Medusa, nodes: Sequence[int], context: int, number: int) -> list[dict]:
    """A row per tree: what a step costs behind `context` tokens, from the heads to the compacted cache, and how much of
    it is Python and PyTorch.
    """
    drafter, dtype, steps = MedusaDrafter(engine.model, engine.heads), engine.dtype, {}
    for n, decoder in _decoders(engine, drafter, nodes, context):
        steps[n, "whole"] = _step(decoder, context)
        steps[n, "python"] = _step(without_kernels(engine, drafter, decoder.tree, context + 64), context)
    taken, limits = medians(steps, number, in_turn=STEPS_IN_TURN)
    rows = []
    for n in nodes:
        seconds = taken[n, "whole"]
        parts = step_parts(engine.model.config, engine.heads, dtype, nodes=n, context=context)
        rows.append({"nodes": n, "context": context} | _measured(parts, seconds, dtype, limits))
        rows[-1]["times_one_node"] = seconds / taken[1, "whole"] if 1 in nodes else None
        rows[-1]["python_percent"] = 100 * taken[n, "python"] / seconds
    return rows


def _decoders(
    engine: Medusa, drafter: MedusaDrafter, nodes: Sequence[int], context: int
) -> Iterator[tuple[int, Decoder]]:
    """For each number of nodes a decoder that has read `context` tokens."""
    ids = prose(engine, context)
    for n in nodes:
        tree = Tree.from_choices([]) if n == 1 else choose_tree(n, drafter, rows=n, batch=1)
        decoder = Decoder(engine.model, drafter, tree, batch=1, max_seqlen=context + 64)
        decoder.start([ids], None)
        yield n, decoder


def _step(decoder: Decoder, context: int) -> Callable[[], None]:
    def call() -> None:
        decoder.step()
        decoder.cache.seqlens.fill_(context)

    return call


def without_kernels(engine: Medusa, drafter: MedusaDrafter, tree: Tree, rows: int) -> Decoder:
    """A decoder whose every launch does nothing: what is left of its step is Python and PyTorch."""

    def nothing(*_: object) -> None:
        pass

    model, launch = engine.model, engine.model.launch
    model.launch = dict.fromkeys(launch, nothing)
    try:
        decoder = Decoder(model, drafter, tree, batch=1, max_seqlen=rows)
        decoder._accept_by(None)
    finally:
        model.launch = launch
    decoder._forward._layers = nothing  # one call of a plan, whatever it holds
    decoder.outcome.block.zero_()
    if decoder.draft is not None:
        decoder.draft.draft_tokens.zero_()
    return decoder


def busy_table(engine: Medusa, nodes: Sequence[int], context: int, number: int) -> list[dict]:
    """A row per tree: its step on a quiet machine, and while another process keeps one core busy, block by block."""
    rows = []
    for n, decoder in _decoders(engine, MedusaDrafter(engine.model, engine.heads), nodes, context):
        step, taken = _step(decoder, context), {False: [], True: []}
        for _ in range(number):
            for busy in taken:
                with busy_core() if busy else contextlib.nullcontext():
                    (times,) = rounds({n: step}, BUSY_STEPS).values()
                taken[busy] += times
        quiet, busy = (statistics.median(times) for times in taken.values())
        rows.append({"nodes": n, "quiet_us": quiet * 1e6, "busy_us": busy * 1e6, "times_quiet": busy / quiet})
    return rows


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Another process computes without end meanwhile; the system moves it as it likes."""
    job = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        job.stdout.readline()
        yield
    finally:
        job.kill()
        job.communicate()


def context_table(engine: Medusa, contexts: Sequence[int], number: int) -> list[dict]:
    """A row per context: decode tokens per second of what follows that many tokens of prose."""
    speeds: dict[tuple[int, bool], list[float]] = {(c, medusa): [] for c in contexts for medusa in (False, True)}
    steps: dict[int, float] = {}
    with tqdm(total=number * len(speeds), desc="contexts", disable=None, leave=False) as bar:
        for _ in range(number):
            for context, medusa in speeds:
                ids = prose(engine, context)
                stats = engine.generate(ids, NEW_TOKENS, medusa=medusa, ignore_eos=True).stats
                speeds[context, medusa].append(stats.tokens_per_second)
                if medusa:
                    steps[context] = stats.tokens_per_step
                bar.update()
    return [
        {
            "context": context,
            "plain_tokens_per_second": statistics.median(speeds[context, False]),
            "medusa_tokens_per_second": statistics.median(speeds[context, True]),
            "tokens_per_step": steps[context],
        }
        for context in contexts
    ]


def prose(engine: Medusa, tokens: int) -> list[int]:
    """The first tokens of bench.quality's prose."""
    ids = engine.tokenizer.encode("\n\n".join(quality.texts("prose")))
    if len(ids) < tokens:
        raise ValueError(f"the prose has {len(ids)} tokens, fewer than a context of {tokens}")
    return ids[:tokens]


def measure(args: argparse.Namespace) -> Iterator[dict]:
    """A results row per dtype."""
    longest = max((args.step_context, *args.contexts)) + NEW_TOKENS
    for dtype in args.dtypes:
        engine = Medusa.from_pretrained(backend="cpu", dtype=dtype, max_seqlen=longest)
        config, heads = engine.model.config, engine.heads
        parts = {n: step_parts(config, heads, dtype, nodes=n, context=args.step_context) for n in args.ops}
        yield {
            "benchmark": "roofline",
            "dtype": dtype,
            "int8_times_gflop_per_s": INT8_SPEED[_C.cpu.isa()],
            "ops": {n: op_table(p, dtype, args.rounds) for n, p in parts.items()},
            "steps": step_table(engine, args.nodes, args.step_context, args.rounds),
            "busy": busy_table(engine, args.busy, args.step_context, math.ceil(args.rounds / 5)),
            "contexts": context_table(engine, args.contexts, math.ceil(args.rounds / 10)),
            **where(engine.model.device),
        }


def lines(row: dict) -> Iterator[str]:
    """The tables of a results row as text."""
    yield f"{row['device']}, {row['threads']} threads, {row['dtype']}"
    for nodes, parts in row["ops"].items():
        yield f"\n{_limits(parts)}"
        whole = sum(p["us"] for p in parts)
        yield f"ops of a step, {nodes} nodes{'':7}calls       MB    Mflop       us   GB/s  % of limit  % of time"
        for p in parts:
            limits = f"{p['gb_per_s']:6.1f} {p['percent_of_limit']:11.0f}" if p["bytes"] else ""
            yield (
                f"{p['part']:20} {p['op']:14} {p['calls']:3} {p['bytes'] / 1e6:8.2f} {p['operations'] / 1e6:8.1f} "
                f"{p['us']:8.1f} {limits:18} {100 * p['us'] / whole:10.1f}"
            )
    if row["steps"]:
        yield f"\n{_limits(row['steps'])}"
        yield "whole step   nodes       MB    Mflop       ms   GB/s  % of limit  x one node  % Python"
        for s in row["steps"]:
            times = "" if s["times_one_node"] is None else f"{s['times_one_node']:11.2f}"
            yield (
                f"{'':12} {s['nodes']:5} {s['bytes'] / 1e6:8.1f} {s['operations'] / 1e6:8.0f} {s['us'] / 1e3:8.2f} "
                f"{s['gb_per_s']:6.1f} {s['percent_of_limit']:11.0f} {times:11} "
                f"{s['python_percent']:9.1f}"
            )
    if row["busy"]:
        yield "\none core busy   nodes   quiet ms   busy ms   x quiet"
        for b in row["busy"]:
            quiet, busy = b["quiet_us"] / 1e3, b["busy_us"] / 1e3
            yield f"{'':13} {b['nodes']:7} {quiet:10.2f} {busy:9.2f} {b['times_quiet']:9.2f}"
    if row["contexts"]:
        yield "\ncontext   plain tokens/s   Medusa tokens/s   tokens/step"
        for c in row["contexts"]:
            yield (
                f"{c['context']:7} {c['plain_tokens_per_second']:16.1f} {c['medusa_tokens_per_second']:17.1f} "
                f"{c['tokens_per_step']:13.2f}"
            )
    yield ""


def _limits(table: Sequence[dict]) -> str:
    measured = table[0]
    return (
        f"reads {measured['read_gb_per_s']:.1f} GB/s, multiplies {measured['product_gflop_per_s']:.0f} GFLOP/s in fp32"
    )


def whole_numbers(text: str) -> tuple[int, ...]:
    """ "1,8" -> (1, 8); an empty text leaves a table out."""
    words = [word for word in text.split(",") if word]
    if not all(word.isdigit() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"must be whole numbers of at least 1 with commas between, not {text!r}")
    return tuple(map(int, words))


def dtype_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in DTYPES]:
        raise argparse.ArgumentTypeError(f"no dtype {unknown[0]!r}; there are {', '.join(DTYPES)}")
    return names


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", type=dtype_names, default=("bfloat16", "int8"), help=f"some of {','.join(DTYPES)}")
    parser.add_argument("--ops", type=whole_numbers, default=(1, 8), help="nodes of the table of ops")
    parser.add_argument("--nodes", type=whole_numbers, default=NODES, help="nodes of the table of steps")
    parser.add_argument("--busy", type=whole_numbers, default=(1, 8), help="nodes of the steps beside a busy core")
    parser.add_argument("--contexts", type=whole_numbers, default=CONTEXTS, help="tokens before the decoded ones")
    parser.add_argument("--step-context", type=int, default=256, help="context of the ops and the steps")
    parser.add_argument("--rounds", type=int, default=30, help="of ops and steps; contexts take a tenth")
    parser.add_argument("--threads", type=int, default=_C.cpu.num_threads())
    parser.add_argument("--output", type=Path, help="append a results row per dtype to this JSONL file")
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args(argv)
    for name in ("rounds", "threads", "step_context"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    _C.cpu.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    try:
        for row in measure(args):
            print(json.dumps(row) if args.as_json else "\n".join(lines(row)), flush=True)
            if args.output:
                append_row(args.output, row)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
