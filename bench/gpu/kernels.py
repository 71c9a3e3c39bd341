"""Every op against its floor, its reference and its rivals, each time from a cold L2."""

# ruff: noqa: C408 - dict(n=1, heads=9) reads better in a table than its literal

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F

from bench import _timing, ops
from medusa_kernels.launches import bind, resolve_all
from medusa_kernels.linear import FEW_ROWS, ROW_INVARIANT

from . import attention_rivals, geometry
from .harness import Case, Options

SECONDS = 0.08  # of rounds per variant
BACKENDS = ("cuda", "triton")
SLOW = 0.1  # seconds: a reference that takes longer is timed once

Run = Callable[[], object]
Rivals = Callable[[ops.Work], Mapping[str, Callable[[], Run]]]  # each by a call of its own that prepares it
Shape = tuple[str, str, str, dict]  # op, case, dtype, dimensions


def cases(options: Options) -> list[Case]:
    """What the project's aims are stated in, at the shapes of both geometries' steps."""
    return [Case("ceilings", ceilings), *(_case(shape) for shape in SHAPES if is_key(shape))]


def more_cases(options: Options) -> list[Case]:
    """The rest of the grid and of the ops."""
    return [_case(shape) for shape in SHAPES if not is_key(shape)]


def is_key(shape: Shape) -> bool:
    op, _, _, dims = shape
    if op == "tree_attention":
        return dims["n"] > 1 and dims["prefix"] >= 8192
    return op in ("draft_heads", "verify_tree", "compact_kv") or (op == "linear" and dims["rows"] <= 64)


def rival_cases(options: Options) -> list[Case]:
    """The grid again, beside the rivals that take seconds to compile."""
    first = [dict(n=64, prefix=p, batch=b) for p, b in ((2048, 1), (8192, 1), (8192, 8), (512, 1), (32768, 1))]
    listed = [_case(shape, attention_compiled) for shape in ATTENTION if shape[3]["n"] > 1]
    order = [f"attention h32x{kv} n{d['n']} b{d['batch']} prefix{d['prefix']}" for d in first for kv in (32, 8)]
    return sorted(listed, key=lambda case: order.index(case.name) if case.name in order else len(order))


ATTENTION: list[Shape] = [
    ("tree_attention", f"attention h32x{kv} n{n} b{batch} prefix{prefix}", "bf16",
     dict(n=n, heads=32, kv_heads=kv, head_dim=128, prefix=prefix, batch=batch))
    for n in (64, 16, 1) for batch in (1, 8) for prefix in (8192, 32768, 2048, 512) for kv in (32, 8)
]  # fmt: skip
SMALL: list[Shape] = [
    *(("draft_heads", f"draft_heads {name} {'own' if own else 'shared'}", "bf16",
       dict(heads=5, hidden=4096, vocab=vocab, top_k=10, own=own))
      for name, vocab in (("vicuna-7b", 32000), ("llama-3-8b", 128256)) for own in (False, True)),
    ("draft_heads", "draft_heads smollm2 8k", "bf16", dict(heads=4, hidden=576, vocab=8192, top_k=10)),
    *(("verify_tree", f"verify_tree {mode} n64 v{vocab} b{batch}", "bf16",
       dict(n=64, vocab=vocab, mode=mode, batch=batch))
      for vocab in (32000, 128256) for batch in (1, 8) for mode in ("greedy", "typical", "lossless")),
    *(("verify_lm_head", f"verify_lm_head {mode} n{n} v{vocab}", "bf16", dict(n=n, hidden=4096, vocab=vocab, mode=mode))
      for vocab in (32000, 128256) for n in (64, 1) for mode in ("greedy", "typical", "lossless")),
    *(("compact_kv", f"compact_kv {name} b{batch}", "bf16",
       dict(layers=32, kv_heads=kv, head_dim=128, moved=4, batch=batch))
      for name, kv in (("vicuna-7b", 32), ("llama-3-8b", 8)) for batch in (1, 8)),
    *(("rms_norm", f"rms_norm r{rows}", "bf16", dict(rows=rows, hidden=4096)) for rows in (1, 64)),
    *(("rotary_append", f"rotary_append h32x{kv} n{n}", "bf16",
       dict(n=n, heads=32, kv_heads=kv, head_dim=128, prefix=2048)) for kv in (32, 8) for n in (1, 64)),
    *(("silu_mul", f"silu_mul r{rows}", "bf16", dict(rows=rows, ffn=11008)) for rows in (1, 64)),
]  # fmt: skip
LINEARS: list[Shape] = [
    *(("linear", f"linear {model} {name} r{rows}", "bf16", dict(rows=rows, inputs=inputs, outputs=outputs))
      for rows in (1, 16, 32, 64, 256)
      for model, config in geometry.GEOMETRIES.items()
      for name, (outputs, inputs) in geometry.linears(config).items()),
]  # fmt: skip
SHAPES = [*ATTENTION, *SMALL, *LINEARS]


def _case(shape: Shape, rivals: Rivals | None = None) -> Case:
    op, name, dtype, dims = shape
    return Case(name, functools.partial(measure, op, dtype, dims, rivals or baseline(op)))


def ceilings() -> Iterator[dict]:
    """What the chip gives in this run: the denominators of every floor, and what the clock itself costs."""
    times = _timing.samples({"nothing": lambda: None}, "cuda", SECONDS)["nothing"]
    yield {
        "benchmark": "ceilings",
        "bandwidth_gb_per_s": _timing.bandwidth("cuda") / 1e9,
        "tflop_per_s": _timing.flops("cuda") / 1e12,
        "empty_us": sorted(times)[len(times) // 2] * 1e6,
    }


def measure(op: str, dtype: str, dims: dict, rivals: Rivals, device: str = "cuda") -> Iterator[dict]:
    """A row per backend and rival that gives the reference's result; one that says so for each that does not."""
    work = made(op, dtype, dims, device)
    reference = ops.call(op, "reference", device, work)
    common = {"benchmark": "kernel", "op": op, "dtype": dtype, "dims": dims}
    runs: dict[str, Run] = {}
    for name, prepare in (ours(op, work, device) | dict(rivals(work))).items():
        try:  # the kernels compiled at their first launch are compiled here, outside every timing
            run = prepare()
            problem = difference(op, work, run, reference)
        except Exception as error:  # a rival that cannot do this shape leaves the others their time
            problem = f"{type(error).__name__}: {str(error).strip()[:200]}"
            torch.zeros((), device=device).item()  # unless the CUDA context is gone: then this raises
        if problem:
            yield common | {"implementation": name, "failed": problem}
        else:
            runs[name] = run
    once = seconds_once(reference, device)
    if once < SLOW:
        runs["reference"] = reference
    times = {"reference": once} | _timing.medians(runs, device, seconds=SECONDS)
    floor = max(work.bytes / _timing.bandwidth(device), work.flops / _timing.flops(device))
    for name, seconds in times.items():
        yield common | {
            "implementation": name,
            "us": seconds * 1e6,
            "gb_per_s": work.bytes / seconds / 1e9,
            "tflop_per_s": work.flops / seconds / 1e12,
            "floor_us": floor * 1e6,
            "percent_of_floor": 100 * floor / seconds,
            "times_reference": times["reference"] / seconds,
        }


def seconds_once(run: Run, device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def made(op: str, dtype: str, dims: dict, device: str) -> ops.Work:
    work = getattr(ops.Maker(device, ops.DTYPES[dtype]), op)(**dims)
    if op == "verify_tree":  # as the engine's LM head leaves them
        logits, *rest = work.arguments
        half = logits.to(ops.DTYPES[dtype])
        return replace(work, arguments=(half, *rest), bytes=ops.storage(half))
    return work


def ours(op: str, work: ops.Work, device: str) -> dict[str, Callable[[], Run]]:
    """The backends that have the op; one that cannot run says why when it is prepared."""
    has = importlib.import_module(f"medusa_kernels.{op}").BACKENDS
    names = BACKENDS if device == "cuda" else ("cpu",)
    found = {name: functools.partial(ops.call, op, name, device, work) for name in names if name in has}
    if op == "linear" and device == "cuda" and len(work.arguments[0]) >= FEW_ROWS:
        # Where our own kernel stops and PyTorch's product begins is to be seen here.
        found["cuda, row-invariant"] = functools.partial(bind, ROW_INVARIANT["cuda"], *work.arguments)
    return found


def difference(op: str, work: ops.Work, run: Callable[[], object], reference: Callable[[], None]) -> str:
    """How what `run` writes or returns differs from the reference, or an empty string."""
    if op == "draft_heads":  # tokens follow their logprobs wherever those are apart; tests/ compares them there
        work = replace(work, outputs=work.outputs[1:])

    def written() -> None:
        for out in work.outputs:  # what is not written differs
            if out.dtype.is_floating_point and op not in ("compact_kv", "rms_norm", "rotary_append"):
                out.fill_(torch.nan)
        result = run()
        if isinstance(result, torch.Tensor):
            work.outputs[0].view(result.shape).copy_(result)

    return ops.failure(work, written, reference, work.arguments[0].dtype)


def attention_baseline(work: ops.Work) -> dict[str, Callable[[], Run]]:
    return {"sdpa": functools.partial(attention_rivals.sdpa, *work.arguments[:6])}


def attention_compiled(work: ops.Work) -> dict[str, Callable[[], Run]]:
    found = {"flex": functools.partial(attention_rivals.flex, *work.arguments[:6])}
    if attention_rivals.has_flashinfer():
        found["flashinfer"] = functools.partial(attention_rivals.flashinfer, *work.arguments[:6])
    return found


def baseline(op: str) -> Rivals:
    """PyTorch's own few calls for the same result, in the model's dtype."""
    if op == "tree_attention":
        return attention_baseline
    known = {"linear": ("torch", _torch_linear), "draft_heads": ("torch", _torch_draft_heads),
             "verify_lm_head": ("torch, verify_tree", _logits_first)}  # fmt: skip
    if op not in known:
        return lambda work: {}
    name, prepare = known[op]
    return lambda work: {name: functools.partial(prepare, work)}


def _torch_linear(work: ops.Work) -> Run:
    x, weight, _, _, out = work.arguments
    return lambda: torch.mm(x, weight.T, out=out)


def _torch_draft_heads(work: ops.Work) -> Run:
    hidden, blocks, _, lm_head, _, top_k, *_ = work.arguments

    def call() -> torch.Tensor:
        x = hidden.expand(len(blocks), *hidden.shape)
        for layer in range(blocks.shape[1]):
            x = x + F.silu(torch.bmm(x, blocks[:, layer].transpose(1, 2)))
        logits = F.linear(x, lm_head) if lm_head.dim() == 2 else torch.bmm(x, lm_head.transpose(1, 2))
        return logits.float().log_softmax(-1).topk(top_k).values.transpose(0, 1)

    return call


def _logits_first(work: ops.Work) -> Run:
    """PyTorch's product and our `verify_tree`: what the engine does without the fused op."""
    (_, (rows, weight, _, _, logits), _), (_, arguments, _) = work.apart
    launch = resolve_all("auto", rows.device)["verify_tree"]
    verify = bind(launch, *arguments[: -len(work.outputs)], *work.outputs)

    def call() -> None:
        torch.mm(rows, weight.T, out=logits)
        verify()

    return call
