"""Microbenchmarks of the ops: `python -m bench.ops [--op OP] [--backend NAME] [--shape NAME] [--json]`.

Each case is checked against the reference first; a backend that fails its check gets no time. One line per case and
backend:

    op shape dtype backend: us | GB/s | % of limit | x reference

The limit is the larger of two times: of the bytes a case must move, at the bandwidth, and of its operations, at the
speed of PyTorch's matrix product (fp32 on the CPU, bf16 on the GPU; for int8 times `step_parts.INT8_SPEED`), both the
best of this very run. A case is timed from a cold cache, by its unchecked launch, as the engine calls it. A fused op is
also compared with its parts, one after the other on the same backend.
"""

# ruff: noqa: C408 - dict(n=1, heads=9) reads better in a table than its literal
from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click
import torch
from torch import Tensor

from bench import _timing
from bench.step_parts import INT8_SPEED
from medusa_engine import benchmark
from medusa_kernels import Tree, launches, pack_linear
from medusa_kernels._backends import _C, resolve
from medusa_kernels.verify_tree import acceptance

# op, shape's name, devices, storage dtypes, dimensions. Storage is that of weights and K/V; on the CPU activations
# are fp32.
CASES = [
    ("tree_attention", "smollm2-plain", "cpu cuda", "bf16", dict(n=1, heads=9, kv_heads=3, head_dim=64, prefix=1024)),
    ("tree_attention", "smollm2-tree16", "cpu cuda", "bf16", dict(n=16, heads=9, kv_heads=3, head_dim=64, prefix=1024)),
    ("tree_attention", "smollm2-tree64", "cpu cuda", "bf16", dict(n=64, heads=9, kv_heads=3, head_dim=64, prefix=1024)),
    ("tree_attention", "vicuna7b-tree64", "cuda", "bf16", dict(n=64, heads=32, kv_heads=32, head_dim=128, prefix=2048)),
    ("tree_attention", "llama8b-tree64-b8", "cuda", "bf16",
     dict(batch=8, n=64, heads=32, kv_heads=8, head_dim=128, prefix=2048)),
    ("draft_heads", "smollm2-shared", "cpu cuda", "bf16", dict(heads=4, hidden=576, vocab=49152, top_k=10)),
    ("draft_heads", "smollm2-8k", "cpu cuda", "bf16", dict(heads=4, hidden=576, vocab=8192, top_k=10)),
    ("draft_heads", "vicuna7b-own", "cuda", "bf16", dict(heads=5, hidden=4096, vocab=32000, top_k=10, own=True)),
    ("verify_tree", "greedy16", "cpu cuda", "fp32", dict(n=16, vocab=49152, mode="greedy")),
    ("verify_tree", "typical16", "cpu cuda", "fp32", dict(n=16, vocab=49152, mode="typical")),
    ("verify_tree", "lossless16", "cpu cuda", "fp32", dict(n=16, vocab=49152, mode="lossless")),
    ("verify_tree", "greedy64", "cpu cuda", "fp32", dict(n=64, vocab=49152, mode="greedy")),
    *(("verify_lm_head", f"smollm2-{mode}{n}", "cpu cuda", dtype, dict(n=n, hidden=576, vocab=49152, mode=mode))
      for mode, n, dtype in (("greedy", 1, "bf16"), ("greedy", 8, "bf16"), ("greedy", 8, "int8"),
                             ("typical", 8, "bf16"), ("lossless", 8, "bf16"))),
    *(("verify_lm_head", f"{name}-{mode}64", "cuda", "bf16", dict(n=64, hidden=4096, vocab=vocab, mode=mode))
      for name, vocab in (("vicuna7b", 32000), ("llama8b", 128256)) for mode in ("greedy", "lossless")),
    ("compact_kv", "smollm2", "cpu cuda", "bf16", dict(layers=30, kv_heads=3, head_dim=64, moved=4)),
    ("compact_kv", "vicuna7b", "cuda", "bf16", dict(layers=32, kv_heads=32, head_dim=128, moved=4)),
    ("rms_norm", "smollm2-r16", "cpu cuda", "bf16", dict(rows=16, hidden=576)),
    ("rms_norm", "vicuna7b-r64", "cuda", "bf16", dict(rows=64, hidden=4096)),
    ("rotary_append", "smollm2-tree16", "cpu cuda", "bf16", dict(n=16, heads=9, kv_heads=3, head_dim=64, prefix=1024)),
    ("rotary_append", "vicuna7b-tree64", "cuda", "bf16", dict(n=64, heads=32, kv_heads=32, head_dim=128, prefix=2048)),
    ("silu_mul", "smollm2-r16", "cpu cuda", "bf16", dict(rows=16, ffn=1536)),
    ("silu_mul", "vicuna7b-r64", "cuda", "bf16", dict(rows=64, ffn=11008)),
    *(("linear", f"smollm2-{name}-r{rows}", "cpu cuda", dtype, dict(rows=rows, inputs=i, outputs=o))
      for name, i, o in (("gate-up", 576, 3072), ("lm-head", 576, 49152))
      for rows in (1, 16) for dtype in ("bf16", "int8")),
    ("linear", "vicuna7b-gate-up-r64", "cuda", "bf16", dict(rows=64, inputs=4096, outputs=22016)),
]  # fmt: skip

BACKENDS = ("reference", "cpu", "cpu-avx2", "cpu-portable", "cuda", "triton")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
# Against the reference, relative to its largest value (int8: to its norm). fp32 sums in another order; one bf16
# rounding; int8 weights as in tests/tolerances.py. See `tolerance`.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.int8: 0.03}


@dataclass
class Work:
    """A case made concrete: arguments of the reference's launch, those of a backend's, and what must be moved and
    computed.
    """

    arguments: tuple
    outputs: tuple[Tensor, ...]  # among the arguments
    bytes: int
    flops: int = 0
    packed: tuple | None = None  # the CPU kernels' arguments where weights are packed
    apart: tuple[tuple[str, tuple, tuple | None], ...] = ()  # a fused op's rival: op, arguments, packed, one by one
    exact: bool = False  # outputs are copied, not computed


def storage(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


class Maker:
    """One method per op: inputs, outputs and the bytes and operations counted from the shapes."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.weights = torch.float32 if dtype == torch.int8 else dtype
        self.activations = torch.float32 if device == "cpu" else self.weights
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, device=self.device) * scale
        return values.to(dtype or self.activations)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(*shape, dtype=dtype or self.activations, device=self.device)

    def integers(self, values) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=self.device)

    def tree_attention(self, n, heads, kv_heads, head_dim, prefix, batch=1) -> Work:
        q = self.normal(batch, n, heads, head_dim)
        k, v = (self.normal(batch, prefix + n + 8, kv_heads, head_dim, dtype=self.weights) for _ in range(2))
        out = torch.empty_like(q)
        keys = batch * (prefix + n) * kv_heads * head_dim
        mask = tree_of(n).mask_words.to(self.device)
        return Work(
            (q, k, v, self.integers([prefix] * batch), mask, head_dim**-0.5, out),
            (out,),
            2 * keys * k.element_size() + 2 * storage(q),
            4 * batch * n * heads * head_dim * (prefix + n),
        )

    def draft_heads(self, heads, hidden, vocab, top_k, layers=1, batch=1, own=False) -> Work:
        x = self.normal(batch, hidden)
        blocks = self.normal(heads, layers, hidden, hidden, dtype=self.weights, scale=hidden**-0.5)
        lm_head = self.normal(*([heads] if own else []), vocab, hidden, dtype=self.weights, scale=hidden**-0.5)
        outputs = (
            self.empty(batch, heads, top_k, dtype=torch.int32),
            self.empty(batch, heads, top_k, dtype=torch.float32),
        )
        packed = None
        if self.device == "cpu":
            packed = (x, pack_linear(blocks), None, pack_linear(lm_head), None, top_k, *outputs)
        products = heads * hidden * (layers * hidden + vocab)
        size = storage(blocks) + storage(lm_head)
        return Work((x, blocks, None, lm_head, None, top_k, *outputs), outputs, size, 2 * batch * products, packed)

    def verify_tree(self, n, vocab, mode, batch=1) -> Work:
        tree = tree_of(n)
        logits = self.normal(batch, n, vocab, dtype=torch.float32, scale=3.0)
        judged, outputs = self._judged(tree, logits.argmax(-1).int(), vocab, mode)
        return Work((logits, *judged, *outputs), outputs, storage(logits), 2 * logits.numel())

    def verify_lm_head(self, n, hidden, vocab, mode, batch=1) -> Work:
        tree = tree_of(n)
        weight = self.normal(vocab, hidden, dtype=self.weights, scale=hidden**-0.5)
        best = torch.randint(vocab, (batch, n), generator=self.generator, device=self.device)
        # One token far above the rest: no rounding, int8's neither, changes what is chosen.
        x = (30 * weight[best]).to(self.activations)
        judged, outputs = self._judged(tree, best.int(), vocab, mode)
        logits, own = self.empty(batch * n, vocab), tuple(map(torch.empty_like, outputs))
        packed = None
        if self.device == "cpu":
            packed = pack_linear(weight, "int8" if self.dtype == torch.int8 else str(self.weights).split(".")[1])
        rows = x.flatten(0, 1)
        apart = (
            ("linear", (rows, weight, None, None, logits), packed and (rows, packed, None, None, logits)),
            ("verify_tree", (logits.view(batch, n, vocab), *judged, *own), None),
        )
        size = vocab * hidden * (1 if self.dtype == torch.int8 else weight.element_size())
        return Work(
            (x, weight, *judged, *outputs),
            outputs,
            size + storage(x) + sum(map(storage, outputs)),
            2 * batch * n * hidden * vocab,
            packed and (x, packed, *judged, *outputs),
            apart,
        )

    def _judged(self, tree: Tree, best: Tensor, vocab: int, mode: str) -> tuple[tuple, tuple[Tensor, ...]]:
        """Tokens, parents and how to accept, where one child per node carries the likeliest token, so that a path of
        full depth is accepted; and the outputs.
        """
        batch = best.shape[0]
        tokens = self.empty(*best.shape, dtype=torch.int32)
        for node, parent in enumerate(tree.parents.tolist()):
            if node:
                tokens[:, node] = (best[:, parent] + tree.ranks[node].item()) % vocab
        how = acceptance(batch, torch.device(self.device), mode=mode, seed=1)
        outputs = (
            self.empty(batch, tree.max_depth + 1, dtype=torch.int32),
            *(self.empty(batch, dtype=torch.int32) for _ in range(2)),
        )
        return (tokens, tree.parents.to(self.device), how), outputs

    def compact_kv(self, layers, kv_heads, head_dim, moved, batch=1, prefix=1024) -> Work:
        cache = self.normal(layers, 2, batch, prefix + 64, kv_heads, head_dim, dtype=self.weights)
        nodes = self.integers([[0, *range(3, 3 + moved)]] * batch)
        arguments = cache, nodes, self.integers([moved] * batch), self.integers([prefix] * batch)
        size = 2 * layers * 2 * batch * moved * kv_heads * head_dim * cache.element_size()
        return Work(arguments, (cache,), size, exact=True)

    def rms_norm(self, rows, hidden) -> Work:
        x, residual, out = self.normal(rows, hidden), self.normal(rows, hidden), self.empty(rows, hidden)
        weight = self.normal(hidden, dtype=self.weights)
        return Work((x, weight, 1e-5, residual, out), (out, residual), 4 * storage(x) + storage(weight))

    def rotary_append(self, n, heads, kv_heads, head_dim, prefix, batch=1) -> Work:
        q = self.normal(batch, n, heads, head_dim)
        k, v = (self.normal(batch, n, kv_heads, head_dim) for _ in range(2))
        angles = self.normal(prefix + n, head_dim // 2, dtype=torch.float32)
        caches = [self.empty(batch, prefix + n, kv_heads, head_dim, dtype=self.weights) for _ in range(2)]
        lengths, depths = self.integers([prefix] * batch), tree_of(n).depths.to(self.device)
        arguments = q, k, v, angles.cos(), angles.sin(), *caches, lengths, depths, None, None, 1e-6
        written = 2 * batch * n * kv_heads * head_dim * caches[0].element_size()
        return Work(arguments, (q, *caches), 2 * storage(q) + 2 * storage(k) + written)

    def silu_mul(self, rows, ffn) -> Work:
        gate_up, out = self.normal(rows, 2 * ffn), self.empty(rows, ffn)
        return Work((gate_up, out), (out,), storage(gate_up) + storage(out))

    def linear(self, rows, inputs, outputs) -> Work:
        x, out = self.normal(rows, inputs), self.empty(rows, outputs)
        weight = self.normal(outputs, inputs, dtype=self.weights, scale=inputs**-0.5)
        name = "int8" if self.dtype == torch.int8 else str(self.weights).removeprefix("torch.")
        packed = (x, pack_linear(weight, name), None, None, out) if self.device == "cpu" else None
        size = outputs * inputs * (1 if self.dtype == torch.int8 else weight.element_size()) + storage(x) + storage(out)
        return Work((x, weight, None, None, out), (out,), size, 2 * rows * inputs * outputs, packed)


def tree_of(n: int) -> Tree:
    """n nodes, breadth first, at most 4 children each."""
    paths: list[list[int]] = [[]]
    for path in paths:  # grows while it is walked
        paths += [[*path, rank] for rank in range(4)][: n - len(paths)]
    return Tree.from_choices(paths[1:])


def variants(device: str, wanted: tuple[str, ...]) -> list[str]:
    every = ["reference", "cpu", "cpu-avx2", "cpu-portable"] if device == "cpu" else ["reference", "cuda", "triton"]
    default = [name for name in every if "-" not in name]
    return [name for name in every if name in wanted] if wanted else default


def call(op: str, variant: str, device: str, work: Work) -> Callable[[], None]:
    """The variant's launch on the case's tensors. Raises ValueError when it cannot run here."""
    return one_after_another(variant, device, ((op, work.arguments, work.packed),))


def one_after_another(
    variant: str, device: str, ops: tuple[tuple[str, tuple, tuple | None], ...]
) -> Callable[[], None]:
    door, _, isa = variant.partition("-")
    bound = []
    for op, arguments, packed in ops:
        launch = resolve(op, importlib.import_module(f"medusa_kernels.{op}").BACKENDS, door, torch.device(device))
        bound.append(launches.bind(launch, *(packed if door == "cpu" and packed else arguments)))

    def run() -> None:
        if door == "cpu":
            _C.cpu.force_isa(isa or "auto")
        for launch in bound:
            launch()

    return run


def failure(work: Work, run: Callable[[], None], reference: Callable[[], None], dtype: torch.dtype) -> str:
    """How the outputs of `run` differ from the reference's, or an empty string. Leaves the outputs as they were.
    `dtype` is the case's storage dtype.
    """
    before = [out.clone() for out in work.outputs]
    results = []
    for launch in (reference, run):
        for out, start in zip(work.outputs, before, strict=True):
            out.copy_(start)
        launch()
        results.append([out.clone() for out in work.outputs])
    for number, (expected, actual) in enumerate(zip(*results, strict=True)):
        if work.exact or not expected.dtype.is_floating_point:
            if wrong := sum(int((a != b).sum()) for a, b in _parts(expected, actual)):
                return f"output {number} differs in {wrong} of {expected.numel()} places"
            continue
        limit = tolerance(work, expected.dtype, dtype)
        # int8's rounding is judged by its norm, the rest by its largest value.
        order = 2 if dtype == torch.int8 else torch.inf
        norms = torch.tensor([[_norm(b.double() - a, order), _norm(a, order)] for a, b in _parts(expected, actual)])
        error, size = torch.linalg.vector_norm(norms, order, dim=0).tolist()
        if not error <= limit * size:
            return f"output {number} is off by {error / size if size else error:.2g}, more than {limit:.2g}"
    return ""


def tolerance(work: Work, output: torch.dtype, storage_dtype: torch.dtype) -> float:
    """What an output may be off by. Its own dtype does not tell: an op may round to the activations' what it passes on
    inside itself, as draft_heads does with the rows that its fp32 log-probabilities come from.
    """
    if storage_dtype == torch.int8:
        return TOLERANCE[torch.int8]
    return max(TOLERANCE[output], TOLERANCE[work.arguments[0].dtype])


def _parts(*tensors: Tensor, size: int = 1 << 26) -> Iterator[tuple[Tensor, ...]]:
    """A few elements of each at a time: in fp64 a cache would not fit beside itself."""
    return zip(*(tensor.flatten().split(size) for tensor in tensors), strict=True)


def _norm(values: Tensor, order: float) -> float:
    return torch.linalg.vector_norm(values.double(), order).item()


def measure(
    op: str, shape: str, device: str, storage_dtype: str, dims: dict, wanted: tuple[str, ...]
) -> Iterator[dict]:
    dtype = DTYPES[storage_dtype]
    work = getattr(Maker(device, dtype), op)(**dims)
    reference = call(op, "reference", device, work)
    label = f"fp32/{storage_dtype}" if device == "cpu" and storage_dtype != "fp32" else storage_dtype
    runs, broken = {}, {}
    for name in variants(device, wanted):
        try:
            run = call(op, name, device, work)
        except ValueError:
            continue  # not here; tests/test_backends.py says which must be
        if dtype == torch.int8 and name != "reference" and work.packed is None:
            continue
        problem = failure(work, run, reference, dtype) if name != "reference" else ""
        if problem:
            broken[name] = problem
        else:
            runs[name] = run
    apart = {f"{n} apart": one_after_another(n, device, work.apart) for n in runs if work.apart and n != "reference"}
    times = _timing.medians(runs | apart | {"reference": reference}, device)
    common = {"op": op, "shape": shape, "dtype": label, "dims": dims}
    for name in runs:
        yield common | {
            "backend": name,
            "us": times[name] * 1e6,
            "gb_per_s": work.bytes / times[name] / 1e9,
            "percent_of_limit": 100 * _floor(work, dtype, device, name) / times[name],
            "times_reference": times["reference"] / times[name],
            **({"times_apart": times[f"{name} apart"] / times[name]} if f"{name} apart" in times else {}),
        }
    for name, problem in broken.items():
        yield common | {"backend": name, "failed": problem}


def _floor(work: Work, dtype: torch.dtype, device: str, name: str) -> float:
    """Seconds that the bytes or the operations of a call must take here; int8's depend on the instruction set."""
    isa = name.removeprefix("cpu-") if name.startswith("cpu-") else _C.cpu.isa()
    speed = _timing.flops(device) * (INT8_SPEED[isa] if dtype == torch.int8 else 1)
    return max(work.bytes / _timing.bandwidth(device), work.flops / speed)


def environment(device: str) -> dict:
    return {
        **benchmark.where(torch.device(device)),
        "bandwidth_gb_per_s": round(_timing.bandwidth(device) / 1e9, 1),
        "gflop_per_s": round(_timing.flops(device) / 1e9, 1),
    }


@click.command(help=__doc__.split("\n")[0])
@click.option("--op", "ops", multiple=True, type=click.Choice(sorted({op for op, *_ in CASES})), help="Default: all.")
@click.option("--backend", "backends", multiple=True, type=click.Choice(BACKENDS), help="Default: all but single ISAs.")
@click.option("--shape", "shapes", multiple=True, help="A shape's name or a part of it. Default: all.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda" if torch.cuda.is_available() else "cpu")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object per line, with device, versions, commit and date."
)
def main(ops, backends, shapes, device, as_json):
    chosen = [
        case for case in CASES
        if device in case[2].split() and (not ops or case[0] in ops) and (not shapes or any(s in case[1] for s in
        shapes))
    ]  # fmt: skip
    if not chosen:
        raise click.UsageError(
            f"no case on {device} has that op and shape; shapes: {', '.join(sorted({c[1] for c in CASES}))}"
        )
    where = environment(device)
    if not as_json:
        click.echo(
            f"{where['device']}, {where['threads']} threads ({where['torch_threads']} of torch), "
            f"torch {where['torch']}, {where['commit']}: "
            f"{where['bandwidth_gb_per_s']} GB/s, {where['gflop_per_s']} GFLOP/s"
        )
    failed = False
    for op, shape, _, dtype, dims in chosen:
        for row in measure(op, shape, device, dtype, dims, backends):
            failed |= "failed" in row
            click.echo(json.dumps(row | where) if as_json else line(row))
    sys.exit(1 if failed else 0)


def line(row: dict) -> str:
    head = f"{row['op']} {row['shape']} {row['dtype']} {row['backend']}:"
    if "failed" in row:
        return f"{head} FAILED its check: {row['failed']}"
    return (
        f"{head} {row['us']:.1f} us | {row['gb_per_s']:.1f} GB/s | {row['percent_of_limit']:.0f}% of limit | "
        f"{row['times_reference']:.1f}x reference"
        + (f" | {row['times_apart']:.2f}x its parts" if "times_apart" in row else "")
    )


if __name__ == "__main__":
    main()
