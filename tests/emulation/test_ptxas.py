"""What ptxas makes of the kernels: nothing spills, and tensor cores and wide copies are used where they belong."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.emulation.locking import alone

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for p in (ROOT / "csrc" / "cuda").glob("*.cu") if p.stem != "device")
ARCHITECTURES = ("80", "90a")
NVCC = shutil.which("nvcc")


def cuobjdump() -> str | None:
    """That of the toolkit, or the one inside Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec and spec.origin else None
    return shutil.which("cuobjdump") or (str(inside) if inside and inside.exists() else None)


def compiled(source: Path, arch: str) -> tuple[str, Path]:
    """ptxas' report and the object file, kept in build/ptxas until a source changes."""
    headers = sorted([*(ROOT / "csrc" / "cuda").glob("*.cuh"), *(ROOT / "csrc").glob("*.h")])
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in [source, *headers])).hexdigest()[:16]
    folder = ROOT / "build" / "ptxas"
    name = f"{source.stem}-sm_{arch}"
    target, report = folder / f"{name}-{digest}.o", folder / f"{name}-{digest}.txt"
    with alone(folder / f"{name}.lock"):
        if not report.exists():
            for old in folder.glob(f"{name}-*"):
                old.unlink()
            command = [NVCC, "-std=c++17", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v"]
            command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-c", str(source), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            report.write_text(done.stderr)
        return report.read_text(), target


def machine_code(source: Path, arch: str) -> str:
    _, built = compiled(source, arch)
    return subprocess.run([cuobjdump(), "-sass", str(built)], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH: nothing to compile the CUDA kernels with")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_nothing_spills(source, arch):
    report, _ = compiled(source, arch)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert frames
    assert set(frames) == {("0", "0", "0")}, report


@pytest.mark.skipif(NVCC is None or cuobjdump() is None, reason="needs nvcc and cuobjdump (in Triton's wheel)")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("op", "instruction"),
    [
        *(
            ("tree_attention", i)
            for i in ("HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "LDGSTS.E.BYPASS.128", "LDSM.16.MT88.4")
        ),
        *(
            (op, i)
            for op in ("draft_heads", "linear", "verify_lm_head")
            for i in ("HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "LDG.E.NA.128")
        ),
        ("compact_kv", "LDG.E.128"),
        ("verify_tree", "LDG.E.128"),
    ],
    ids=lambda x: x.strip(),
)
def test_machine_code_has(op, instruction, arch):
    assert instruction in machine_code(ROOT / "csrc" / "cuda" / f"{op}.cu", arch)


@pytest.mark.skipif(NVCC is None or cuobjdump() is None, reason="needs nvcc and cuobjdump (in Triton's wheel)")
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_no_kernel_touches_memory_before_the_previous_one_has_ended(source):
    """Neither as written nor as ptxas ordered it: prefetches alone may stand before the wait. See csrc/cuda/ptx.cuh."""
    opcode = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)")
    touches = re.compile(r"(LD|ST|ATOM|RED)(G|\.|$)|LDGSTS|EXIT")
    kernels = machine_code(source, "90a").split("Function : ")[1:]
    assert kernels
    for kernel in kernels:
        name, *lines = kernel.splitlines()
        opcodes = [m[1] for m in map(opcode.match, lines) if m]
        wait = opcodes.index("ACQBULK")
        assert not [o for o in opcodes[:wait] if touches.match(o)], (name, opcodes[:wait])
        assert opcodes.index("PREEXIT") > wait, name
        assert not [o for o in opcodes if "CONSTANT" in o], f"{name}: a load that the previous kernel's writes may miss"
