"""Builds medusa_kernels/_C for the GPU at hand with the packages that are there: `python -m bench.gpu.build`.

Nothing is fetched. Exit status 0 also where there is no GPU: then there is nothing to build.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240  # for one way


class Way(NamedTuple):
    name: str
    command: list[str]
    folder: Path


def ways(empty: Path) -> list[Way]:
    """The usual way first. Pip may be refused by a Python that a distribution manages, and setuptools before 77 rejects
    the pyproject.toml: the second way needs neither, as setup.py runs in a folder without one.
    """
    pip = ["-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--editable", str(ROOT)]
    setup = [str(ROOT / "setup.py"), "--quiet", "build_ext", "--build-lib", str(ROOT)]
    return [Way(name, [sys.executable, *command], folder) for name, command, folder in
            (("pip", pip, ROOT), ("setup.py", setup, empty))]  # fmt: skip


def built(ways: Sequence[Way], env: Mapping[str, str], seconds: float = SECONDS) -> str:
    """The first way that works, or an empty string; why another did not is printed."""
    for way in ways:
        process = subprocess.Popen(
            way.command, cwd=way.folder, env=env, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its compilers too
            output = f"{process.communicate()[0]}\nkilled after {seconds:.0f} s"
        if process.returncode == 0:
            return way.name
        why = "\n".join(output.strip().splitlines()[-30:])
        print(f"the build by {way.name} failed:\n{why}", flush=True)
    return ""


def architectures() -> list[str]:
    """Compute capabilities without their points: ["90"]; empty where there is no NVIDIA GPU."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    found = {line.strip().replace(".", "") for line in said.splitlines()}
    return sorted(arch for arch in found if arch.isdigit()) or _architectures_by_torch()


def _architectures_by_torch() -> list[str]:
    """For machines that have the driver and not its tool."""
    try:
        import torch
    except ImportError:
        return []
    capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return sorted({f"{major}{minor}" for major, minor in capabilities}) if torch.version.hip is None else []


def main() -> int:
    archs = architectures()
    if not archs:
        print("no NVIDIA GPU here: nothing is built")
        return 0
    env = os.environ | {
        "MEDUSA_CUDA": "on",
        "MEDUSA_CUDA_ARCHS": ";".join(archs),
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
    }
    start = time.time()
    with tempfile.TemporaryDirectory() as empty:
        way = built(ways(Path(empty)), env)
    taken = f"{time.time() - start:.0f} s"
    said = f"built by {way} for {' '.join(archs)}, {taken}" if way else f"the CUDA kernels could not be built, {taken}"
    print(said, flush=True)
    return 0 if way else 1


if __name__ == "__main__":
    sys.exit(main())
