"""What the engine runs on, as people name it."""

from __future__ import annotations

import os
import platform

import torch

from medusa_kernels._backends import _C


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
