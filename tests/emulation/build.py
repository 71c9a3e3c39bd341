"""Compiles the CUDA kernels' bodies for the CPU: csrc/cuda/*.cu, unchanged, over cuda_emu.h in the place of ptx.cuh."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

from tests.emulation.locking import alone

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "emulation"
# Sums as the GPU makes them need no reassociation; -O1 compiles in half the time of -O2 and runs as fast for fibers.
FLAGS = (
    *(
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fno-strict-aliasing",
        "-U_FORTIFY_SOURCE",
        "-fvisibility=hidden",
        "-march=native",
        "-w",
    ),
    *("-DMEDUSA_EMULATE", "-DMEDUSA_WITH_CUDA", f"-I{ROOT / 'csrc'}", f"-I{HERE}"),
    *(f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"),
)


@functools.cache
def module() -> ModuleType:
    """The emulated `_C`, built if a source has changed since the last time."""
    sources = [
        *sorted(p for p in (ROOT / "csrc" / "cuda").glob("*.cu") if p.stem != "device"),
        ROOT / "csrc" / "bindings.cpp",
        HERE / "cuda_emu.cpp",
    ]
    headers = [
        *(ROOT / "csrc" / "cuda").glob("*.cuh"),
        ROOT / "csrc" / "cuda" / "ops.h",
        ROOT / "csrc" / "params.h",
        HERE / "cuda_emu.h",
    ]
    shared = hashlib.sha256(b"".join([*(p.read_bytes() for p in sorted(headers)), repr(FLAGS).encode()]))
    with alone(FOLDER / "lock"), ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(functools.partial(_compiled, shared.digest()), sources))
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        library = FOLDER / f"{hashlib.sha256(''.join(map(str, objects)).encode()).hexdigest()[:16]}{suffix}"
        if not library.exists():
            _run("-shared", *map(str, objects), "-o", library)
    spec = importlib.util.spec_from_file_location("_C", library)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _compiled(shared: bytes, source: Path) -> Path:
    digest = hashlib.sha256(shared + source.read_bytes()).hexdigest()[:16]
    target = FOLDER / f"{source.stem}-{digest}.o"
    if not target.exists():
        for old in FOLDER.glob(f"{source.stem}-*.o"):
            old.unlink(missing_ok=True)
        _run(*FLAGS, "-x", "c++", "-c", str(source), "-o", target)
    return target


def _run(*arguments: object) -> None:
    """Runs the compiler; the last argument is its output, which appears only when it is whole."""
    *arguments, output = arguments
    unfinished = Path(f"{output}.{os.getpid()}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    done = subprocess.run([compiler, *arguments, str(unfinished)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulation did not compile:\n{done.stderr}")
    unfinished.rename(output)
