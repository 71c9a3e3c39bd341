"""Builds medusa_kernels/_C by CMake + Ninja; nothing else. pyproject.toml holds the rest.

Environment: MEDUSA_CUDA=auto|on|off, MEDUSA_CUDA_ARCHS="80;90;...", MEDUSA_CMAKE_ARGS, MAX_JOBS.
"""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str, folder: str) -> str:
    """The binary inside the pip package, else the one on PATH: pip's console shim breaks under build isolation."""
    try:
        packaged = Path(getattr(importlib.import_module(name), folder)) / name
    except (ImportError, AttributeError):
        packaged = None
    found = str(packaged) if packaged and packaged.exists() else shutil.which(name)
    if not found:
        sys.exit(f"medusa-kernels needs {name} to build: pip install {name}")
    return found


def is_stale(cache: Path) -> bool:
    """Whether a build folder was configured with tools that are gone, as isolated builds leave behind."""
    if not cache.exists():
        return False
    entries = dict(line.split("=", 1) for line in cache.read_text().splitlines() if "=" in line)
    paths = (
        value
        for key, value in entries.items()
        if key.split(":")[0] in ("CMAKE_MAKE_PROGRAM", "CMAKE_COMMAND", "pybind11_DIR")
    )
    return any(not Path(path).exists() for path in paths)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "MEDUSA_OUTPUT_DIR": output,
            "MEDUSA_CUDA": os.environ.get("MEDUSA_CUDA", "auto"),
        }
        archs = os.environ.get("MEDUSA_CUDA_ARCHS")
        command = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
        command += ["--fresh"] if is_stale(folder / "CMakeCache.txt") else []
        command += [f"-D{key}={value}" for key, value in options.items()]
        command += [f"-DMEDUSA_CUDA_ARCHS={archs}" if archs else "-UMEDUSA_CUDA_ARCHS"]  # no earlier build's
        command += shlex.split(os.environ.get("MEDUSA_CMAKE_ARGS", ""))
        print(shlex.join(command), flush=True)
        subprocess.check_call(command)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 2))
        subprocess.check_call([cmake, "--build", str(folder), "--parallel", jobs])


setup(ext_modules=[Extension("medusa_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
