"""The CUDA kernels on small inputs, each result compared with the CPU's reference: `python -m bench.gpu.small`.

Small enough to run under compute-sanitizer: inputs come ready from the CPU, so that hardly a kernel but ours runs.
Every launch is repeated, because a combine that leaves its counters above 0 goes wrong the second time.
"""

# ruff: noqa: C408 - dict(n=1, heads=9) reads better in a table than its literal
from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils import _pytree

from bench import ops

# op, storage dtype, dimensions: what splits its work over blocks that combine their parts comes first, in sizes that do
# and do not split.
CASES = [
    *(("tree_attention", dtype, dict(batch=batch, n=n, heads=heads, kv_heads=2, head_dim=dim, prefix=prefix))
      for dtype, batch, n, heads, dim, prefix in (
          ("bf16", 1, 16, 8, 64, 1500), ("bf16", 2, 70, 4, 128, 700), ("bf16", 1, 1, 4, 128, 2000),
          ("bf16", 3, 5, 2, 80, 3), ("fp32", 1, 16, 4, 64, 300))),
    *(("draft_heads", dtype, dict(heads=3, hidden=hidden, vocab=vocab, top_k=top_k, batch=batch, own=own))
      for dtype, hidden, vocab, top_k, batch, own in (
          ("bf16", 256, 5000, 10, 1, False), ("bf16", 128, 3001, 4, 3, True), ("fp32", 64, 1000, 10, 2, False))),
    *(("verify_tree", "fp32", dict(n=n, vocab=vocab, mode=mode, batch=batch))
      for n, vocab, batch in ((16, 20000, 2), (64, 3001, 1)) for mode in ("greedy", "typical", "lossless")),
    ("compact_kv", "bf16", dict(layers=3, kv_heads=2, head_dim=64, moved=4, batch=2, prefix=50)),
    ("rms_norm", "bf16", dict(rows=5, hidden=576)),
    ("rotary_append", "bf16", dict(n=16, heads=4, kv_heads=2, head_dim=64, prefix=20, batch=2)),
    ("silu_mul", "bf16", dict(rows=5, ffn=1536)),
    *(("linear", dtype, dict(rows=rows, inputs=256, outputs=500))
      for dtype, rows in (("bf16", 1), ("bf16", 7), ("bf16", 16), ("fp32", 1), ("fp32", 40))),
]  # fmt: skip


def name(op: str, dtype: str, dims: dict) -> str:
    return f"{op} {dtype} {' '.join(f'{key}={value}' for key, value in dims.items())}"


def works(op: str, dtype: str, dims: dict, device: str = "cuda") -> tuple[ops.Work, ops.Work]:
    """The case on the CPU, with the GPU's dtypes, and its copy on `device`."""
    maker = ops.Maker("cpu", ops.DTYPES[dtype])
    maker.activations = maker.weights
    work = getattr(maker, op)(**dims)
    if op == "draft_heads":  # tokens follow their logprobs wherever those are apart; tests/ compares them there
        work = replace(work, outputs=work.outputs[1:])
    copies: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        return copies.setdefault(id(tensor), tensor.to(device, copy=True))

    arguments = _pytree.tree_map_only(Tensor, copied, work.arguments)
    outputs = tuple(copies[id(out)] for out in work.outputs)
    return work, replace(work, arguments=arguments, outputs=outputs, packed=None)


def failure(op: str, dtype: str, dims: dict, *, device: str = "cuda", backend: str = "cuda", repeats: int = 3) -> str:
    """How the kernel's results differ from the reference's, or from one launch to the next; else an empty string."""
    here, there = works(op, dtype, dims, device)
    launch = ops.call(op, backend, device, there)
    results = []

    def run() -> None:
        for out, start in zip(there.outputs, here.outputs, strict=True):
            out.copy_(start)
        launch()
        for out, result in zip(here.outputs, there.outputs, strict=True):
            out.copy_(result)
        results.append([out.clone() for out in here.outputs])

    problem = ops.failure(here, run, ops.call(op, "reference", "cpu", here), ops.DTYPES[dtype])
    start = [out.clone() for out in here.outputs]
    for _ in range(repeats):
        for out, before in zip(here.outputs, start, strict=True):
            out.copy_(before)
        run()
    # The first result began from other outputs than those that an op in place has left.
    return problem or ("two launches differ" if any(not _equal(results[1], later) for later in results[2:]) else "")


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def unstable(
    op: str, dtype: str, dims: dict, *, device: str = "cuda", backend: str = "cuda", repeats: int = 300
) -> str:
    """Whether an op that writes only its outputs gives other bits at another launch: the mark of a race."""
    _, there = works(op, dtype, dims, device)
    launch = ops.call(op, backend, device, there)
    launch()
    first = [out.clone() for out in there.outputs]
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(repeats):
        for out in there.outputs:
            out.zero_()
        launch()
        for out, expected in zip(there.outputs, first, strict=True):
            wrong += (out != expected).any()
    count = int(wrong)
    return f"{count} of {repeats} launches gave other bits than the first" if count else ""


def checks() -> list[tuple[str, Callable[[], str]]]:
    """(name, call that gives the failure): every case, then the stability of those that combine parts of blocks."""
    found = [(name(*case), functools.partial(failure, *case)) for case in CASES]
    combining = [case for case in CASES if case[0] in ("tree_attention", "draft_heads", "verify_tree")]
    return found + [(f"stable: {name(*case)}", functools.partial(unstable, *case)) for case in combining]


def main() -> int:
    """A line for each case, as soon as it is known: a sanitizer may be killed before the end. Exit status 1 if one is
    wrong.
    """
    wrong = 0
    for number, case in enumerate(CASES, 1):
        problem = failure(*case, repeats=1)
        wrong += bool(problem)
        print(f"{number} of {len(CASES)}: {name(*case)}: {problem or 'right'}", flush=True)
    print(f"{len(CASES) - wrong} of {len(CASES)} cases are right")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
