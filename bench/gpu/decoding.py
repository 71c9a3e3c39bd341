"""A whole decoding step at the geometries of Vicuna-7B and Llama-3-8B: random weights, acceptance replayed."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator

import torch

from bench import _timing
from medusa_engine.captured import RUN_AHEAD, Cuda, StepsAhead
from medusa_engine.decode import Decoder
from medusa_engine.draft import MedusaDrafter
from medusa_engine.model import Model
from medusa_kernels import Tree

from . import geometry, replay
from .harness import Case, Options

NODES = 64
CONTEXTS, BATCHES = (512, 2048, 8192, 32768), (1, 4, 16)
STEPS, GROUPS = 20, 5  # a group is timed as one; the median of the groups counts
ROWS_SPARE = 512  # what all steps of a case may add to the context


def cases(options: Options) -> list[Case]:
    listed = [(name, batch, context, False) for batch in BATCHES for context in CONTEXTS for name in
              geometry.GEOMETRIES]  # fmt: skip
    listed[2:2] = [(name, 1, 512, True) for name in geometry.GEOMETRIES]
    made = [
        Case(f"{name} b{batch} context{context}{' own LM heads' * own}",
             functools.partial(measure, name, batch, context, own))
        for name, batch, context, own in listed
    ]  # fmt: skip
    made.insert(4, Case("trace", functools.partial(trace, options)))
    return made


@functools.cache
def model_of(name: str) -> tuple[geometry.RandomCheckpoint, Model]:
    checkpoint = geometry.RandomCheckpoint(geometry.GEOMETRIES[name], "cuda")
    positions = max(CONTEXTS) + ROWS_SPARE + 256
    options = {"backend": "auto", "device": torch.device("cuda"), "dtype": "bfloat16"}
    return checkpoint, Model(checkpoint, max_positions=positions, **options)


class Prepared:
    """A decoder that has started, its cache filled up to `context`, and its step captured."""

    def __init__(self, model: Model, drafter: MedusaDrafter | None, tree: Tree, batch: int, context: int,
                 tokens_per_step: float | None = None):  # fmt: skip
        self.context, self.tokens_per_step = context, 1.0
        kind = Decoder if tokens_per_step is None else replay.ReplayedDecoder
        self.decoder = kind(model, drafter, tree, batch=batch, max_seqlen=context + ROWS_SPARE, run_ahead=RUN_AHEAD)
        if tokens_per_step is not None:
            nodes = replay.draw(tree, tokens_per_step, (STEPS * GROUPS, batch))
            self.tokens_per_step += tree.depths[nodes].float().mean().item()
            self.decoder.replay(nodes)
        self.steps = StepsAhead(self.decoder, Cuda(model.device))
        self.steps.start([[1] * 8] * batch, None)
        for layer in self.decoder.cache.data:
            layer.normal_()
        self.rewind()
        for _ in range(2):  # verb by verb, then captured
            self.steps.step()

    def rewind(self) -> None:
        self.decoder.cache.seqlens.fill_(self.context)

    def graph_seconds(self) -> float:
        """The device's time for one step, one graph launched behind the other."""
        taken = []
        for _ in range(1 + GROUPS):  # the first warms up
            self.rewind()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(STEPS):
                self.steps.step()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3 / STEPS)
        return statistics.median(taken[1:])

    def engine_seconds(self) -> float:
        """The host's time for one step as `Medusa.generate` takes it: every step's tokens are read."""
        self.rewind()
        self.steps.next(1)
        start = time.perf_counter()
        for left in range(STEPS, 0, -1):
            self.steps.next(left)
        return (time.perf_counter() - start) / STEPS


def measure(name: str, batch: int, context: int, own_lm_heads: bool) -> Iterator[dict]:
    """A row for plain decoding and one for each replayed acceptance."""
    checkpoint, model = model_of(name)
    config = model.config
    cache, free = geometry.kv_bytes(config, batch * (context + ROWS_SPARE + NODES)), torch.cuda.mem_get_info()[0]
    if cache > 0.85 * free:
        yield {"benchmark": "skipped", "reason": f"its K/V are {cache / 2**30:.0f} GiB, {free / 2**30:.0f} are free"}
        return
    bandwidth = _timing.bandwidth("cuda")
    weights, read = geometry.weight_bytes(config), geometry.kv_bytes(config, batch * context)
    common = {"benchmark": "step", "model": name, "backend": model.backend, "dtype": "bfloat16", "batch": batch,
              "context": context, "weight_floor_us": 1e6 * weights / bandwidth}  # fmt: skip

    def row(prepared: Prepared, bytes_read: int) -> dict:
        seconds = prepared.graph_seconds()
        return common | {
            "step_us": 1e6 * seconds,
            "floor_us": 1e6 * bytes_read / bandwidth,
            "times_floor": seconds * bandwidth / bytes_read,
            "times_weight_floor": seconds * bandwidth / weights,
            "tokens_per_step": prepared.tokens_per_step,
            "tokens_per_second": batch * prepared.tokens_per_step / seconds,
            "engine_step_us": 1e6 * prepared.engine_seconds(),
        }

    plain = row(Prepared(model, None, Tree.from_choices([]), batch, context), weights + read)
    yield {"decoding": "plain"} | plain
    drafter = MedusaDrafter(model, geometry.random_heads(checkpoint, own_lm_heads=own_lm_heads))
    read += geometry.heads_bytes(config, own_lm_heads=own_lm_heads)
    tree = replay.tree_of(NODES)
    for published in replay.TOKENS_PER_STEP if context == CONTEXTS[0] else ("medusa-1",):
        prepared = Prepared(model, drafter, tree, batch, context, replay.TOKENS_PER_STEP[published])
        found = row(prepared, weights + read)
        yield {
            "decoding": f"{published}, acceptance replayed",
            "nodes": NODES,
            "own_lm_heads": own_lm_heads,
            "overhead": found["step_us"] / plain["step_us"],
            "speedup": found["tokens_per_second"] / plain["tokens_per_second"],
        } | found


def trace(options: Options, steps: int = 3) -> Iterator[dict]:
    """A profiler's trace of a few steps: how much of their span kernels fill, and that nothing is copied to the
    host."""
    checkpoint, model = model_of("vicuna-7b")
    drafter = MedusaDrafter(model, geometry.random_heads(checkpoint, own_lm_heads=False))
    prepared = Prepared(model, drafter, replay.tree_of(NODES), 1, CONTEXTS[0], replay.TOKENS_PER_STEP["medusa-1"])
    prepared.graph_seconds()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            prepared.steps.step()
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(options.logs / "step-trace.json.gz"))
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    begin, end = min(e.time_range.start for e in on_device), max(e.time_range.end for e in on_device)
    busy, reached = 0.0, begin
    for event in sorted(on_device, key=lambda e: e.time_range.start):
        busy += max(0.0, event.time_range.end - max(reached, event.time_range.start))
        reached = max(reached, event.time_range.end)
    yield {
        "benchmark": "trace",
        "steps": steps,
        "launches_per_step": len(on_device) / steps,
        "busy_percent": 100 * busy / (end - begin),
        "copies_to_host": sum("DtoH" in e.name for e in on_device),
    }
