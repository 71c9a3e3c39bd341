"""Compiles the Triton kernels for GPUs that need not be here: `python -m bench.triton_aot --targets sm_90,gfx942`.

Each case plans an op's launches on tensors without memory, as the backend itself does, and compiles every kernel with
the specialisations that such a launch has. One line per kernel and target:

    op case kernel target: registers | stack bytes | shared bytes

Stack bytes are those of one thread: registers that spill go there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from medusa_kernels.triton import Call, Target

RESULTS = Path(__file__).parent / "results" / "triton-aot.jsonl"
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
POINTERS = {
    **{torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"},
    **{torch.int32: "*i32", torch.int64: "*i64"},
}

# Op, case, dtype, dimensions (those of bench.ops), in the order of interest: an op's first case has all its kernels.
CASES = [
    ("tree_attention", "vicuna7b-tree64", "bf16", {"n": 64, "heads": 32, "kv_heads": 32, "head_dim": 128}),
    ("tree_attention", "llama8b-tree64", "bf16", {"n": 64, "heads": 32, "kv_heads": 8, "head_dim": 128}),
    ("tree_attention", "llama8b-tree16-b16", "fp16",
     {"batch": 16, "n": 16, "heads": 32, "kv_heads": 8, "head_dim": 128}),
    ("tree_attention", "smollm2-plain", "bf16", {"n": 1, "heads": 9, "kv_heads": 3, "head_dim": 64}),
    ("tree_attention", "dim80", "bf16", {"n": 64, "heads": 32, "kv_heads": 32, "head_dim": 80}),
    ("tree_attention", "dim256", "bf16", {"n": 64, "heads": 8, "kv_heads": 4, "head_dim": 256}),
    ("tree_attention", "fp32", "fp32", {"n": 64, "heads": 9, "kv_heads": 3, "head_dim": 64}),
    ("draft_heads", "vicuna7b-own", "bf16", {"heads": 5, "hidden": 4096, "vocab": 32000, "top_k": 10, "own": True}),
    ("draft_heads", "llama8b-shared", "bf16", {"heads": 5, "hidden": 4096, "vocab": 128256, "top_k": 10}),
    ("draft_heads", "smollm2-b16", "fp16",
     {"batch": 16, "heads": 4, "hidden": 576, "vocab": 49152, "top_k": 10}),
    ("draft_heads", "two-blocks-b64", "bf16",
     {"batch": 64, "heads": 3, "hidden": 2048, "vocab": 32000, "top_k": 10, "layers": 2, "own": True}),
    ("draft_heads", "fp32", "fp32", {"heads": 4, "hidden": 576, "vocab": 8192, "top_k": 10}),
    ("verify_tree", "mixed64", "bf16", {"n": 64, "vocab": 32000, "sampled": True}),
    ("verify_tree", "greedy64", "bf16", {"n": 64, "vocab": 128256}),
    ("verify_tree", "mixed64-fp32", "fp32", {"n": 64, "vocab": 128256, "sampled": True}),
    ("compact_kv", "vicuna7b", "bf16", {"layers": 32, "kv_heads": 32, "head_dim": 128}),
    ("compact_kv", "smollm2", "fp32", {"layers": 30, "kv_heads": 3, "head_dim": 64}),
]  # fmt: skip


def arguments(op: str, dtype: torch.dtype, dims: dict) -> tuple:
    """Those of the op's launch, as tensors without memory."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def integers(*shape: int) -> Tensor:
        return empty(*shape, dtype=torch.int32)

    batch = dims.get("batch", 1)
    if op == "tree_attention":
        n, head_dim, capacity = dims["n"], dims["head_dim"], 4096
        q = empty(batch, n, dims["heads"], head_dim)
        caches = [empty(batch, capacity, dims["kv_heads"], head_dim) for _ in range(2)]
        mask = empty(n, (n + 63) // 64, dtype=torch.int64)
        return q, *caches, integers(batch), mask, head_dim**-0.5, torch.empty_like(q)
    if op == "draft_heads":
        heads, hidden, vocab, top_k = (dims[name] for name in ("heads", "hidden", "vocab", "top_k"))
        lm_head = empty(*([heads] if dims.get("own") else []), vocab, hidden)
        outputs = integers(batch, heads, top_k), empty(batch, heads, top_k, dtype=torch.float32)
        blocks = empty(heads, dims.get("layers", 1), hidden, hidden)
        return empty(batch, hidden), blocks, None, lm_head, None, top_k, *outputs
    if op == "verify_tree":
        n, depth = dims["n"], 5
        kinds = (torch.int32, *[torch.float32] * 2, torch.int32, *[torch.float32] * 2, *[torch.int64] * 2)
        how = tuple(empty(batch, dtype=kind) for kind in kinds) if dims.get("sampled") else None
        outputs = integers(batch, depth + 1), integers(batch), integers(batch)
        return empty(batch, n, dims["vocab"]), integers(batch, n), integers(n), how, *outputs
    cache = empty(dims["layers"], 2, batch, 4096, dims["kv_heads"], dims["head_dim"])
    return cache, integers(batch, 6), integers(batch), integers(batch)


def source(call: Call) -> ASTSource:
    """What Triton's just-in-time compiler makes of such a call: an int of 1 is a constant, and that addresses and ints
    are divisible by 16 is known to the kernel.
    """
    names = call.kernel.arg_names
    values = dict(zip(names, call.arguments, strict=False)) | dict(call.constants)
    signature, constants, known = {}, {}, {}
    for i, name in enumerate(names):
        value = values[name]
        if name in call.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            known[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=call.kernel, signature=signature, constexprs=constants, attrs=known)


def compiled(call: Call, target: str):
    hip = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return triton.compile(
        source(call), target=gpu, options={"num_warps": call.warps, "num_stages": call.stages}
    )  # fmt: skip


def usage(kernel) -> dict:
    """Registers and stack bytes of a thread, shared bytes of a program."""
    if "amdgcn" in kernel.asm:
        counts = dict(re.findall(r"\.(\w+):\s+(\d+)", kernel.asm["amdgcn"]))
        registers, stack = counts["vgpr_count"], counts["private_segment_fixed_size"]
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
        counts = dict(re.findall(r"\b(REG|STACK):(\d+)", done.stdout))
        registers, stack = counts["REG"], counts["STACK"]
    return {"registers": int(registers), "stack_bytes": int(stack), "shared_bytes": kernel.metadata.shared}


def plans(targets: list[str], cases: list[tuple]) -> Iterator[tuple[dict, Call]]:
    """Every launch of every case, and what its row says of it before it is compiled."""
    for target in targets:
        chip = Target(PROCESSORS[target], hip=target.startswith("gfx"))
        for op, case, dtype, dims in cases:
            for call in import_module(f"medusa_kernels.triton.{op}").calls(chip, *arguments(op, DTYPES[dtype], dims)):
                constants = {name: value if isinstance(value, int) else str(value) for name, value in
                             call.constants.items()}  # fmt: skip
                row = {"benchmark": "triton-aot", "op": op, "case": case, "dtype": dtype, "target": target}
                row |= {"kernel": call.kernel.__name__, "constants": constants}
                yield row | {"warps": call.warps, "stages": call.stages}, call


def rows(targets: list[str], cases: list[tuple]) -> Iterator[dict]:
    for row, call in plans(targets, cases):
        yield row | usage(compiled(call, row["target"])) | {"triton": triton.__version__}


@click.command(help=__doc__.split("\n")[0])
@click.option("--targets", default="sm_90,gfx942", show_default=True, help=f"Of {', '.join(PROCESSORS)}.")
@click.option(
    "--op", "ops", multiple=True, type=click.Choice(sorted({case[0] for case in CASES})), help="Default: all."
)
@click.option("--brief", is_flag=True, help="Only the first case of each op: every kernel once.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option("--record", is_flag=True, help=f"Write the rows to {RESULTS.relative_to(RESULTS.parents[2])}.")
def main(targets, ops, brief, as_json, record):
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise click.UsageError("TRITON_INTERPRET must not be 1: interpreted kernels cannot be compiled")
    wanted = targets.split(",")
    if unknown := [target for target in wanted if target not in PROCESSORS]:
        raise click.UsageError(f"targets must be among {', '.join(PROCESSORS)}, not {unknown[0]!r}")
    firsts = {case[0]: case for case in reversed(CASES)}
    cases = [case for case in CASES if (not ops or case[0] in ops) and (not brief or firsts[case[0]] is case)]
    found = []
    for row in rows(wanted, cases):
        found.append(row)
        click.echo(json.dumps(row) if as_json else line(row))
    if record:
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def line(row: dict) -> str:
    return (
        f"{row['op']} {row['case']} {row['kernel']} {row['target']}: {row['registers']} registers | "
        f"{row['stack_bytes']} stack bytes | {row['shared_bytes']} shared bytes"
    )


if __name__ == "__main__":
    main()
