"""What the engine runs on: how people name it, and whether it is there."""

from __future__ import annotations

import os
import platform
from functools import cache

import torch

from medusa_kernels._backends import _C


@cache
def processor() -> str:
    """The CPU's model name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def kernel_threads() -> int:
    """Threads of the CPU kernels, or PyTorch's where those are not built."""
    return torch.get_num_threads() if _C is None else _C.cpu.num_threads()


def cheap_rows(device: torch.device) -> int:
    """How many rows a step can have that cost little more than one: beyond them arithmetic, not the weights' traffic,
    sets its time.

    AVX-512 on Zen 4: 6 nodes cost 1.3 steps, 8 cost 1.5. AVX2 on Zen 3, Medusa over plain decoding with 2, 3, 4, 5, 6
    and 8 nodes, 10 prompts: bf16 1.28, 1.39, 1.46, 1.41, 1.41, 1.26; int8 1.20, 1.25, 1.28, 1.16, 1.19, 1.03. On a GPU
    not measured yet.
    """
    if device.type == "cuda":
        return 64
    return 6 if _C is not None and _C.cpu.isa() == "avx512" else 4


def hardware(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its cores and the instructions that the kernels use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {os.cpu_count()} cores" + ("" if _C is None else f", {_C.cpu.isa()}")


def describe(device: torch.device) -> str:
    """What the speed of a step depends on: the hardware, and on a CPU how many threads the kernels use."""
    if device.type == "cuda":
        return hardware(device)
    threads = kernel_threads()
    return f"{hardware(device)}, {threads} thread{'s' if threads > 1 else ''}"


def choose_device(device: str | torch.device | None, backend: str) -> torch.device:
    """The device meant by `device`: None is CUDA where `backend` can run there and a GPU is present, else the CPU.

    Raises:
        ValueError: it is no CPU or CUDA device, or not here.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        needs_gpu = backend in ("cuda", "triton")
        if needs_gpu and not gpus:
            raise ValueError(f"backend {backend!r} cannot be used: PyTorch finds no CUDA device here")
        return torch.device("cuda" if needs_gpu or (backend == "auto" and gpus) else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or CUDA device, not {str(device)!r}")
    if found.type == "cuda" and (found.index or 0) >= gpus:
        here = f"only {gpus}, the first of them cuda:0" if gpus else "no CUDA device here"
        raise ValueError(f"device {str(device)!r} cannot be used: PyTorch finds {here}")
    return found
