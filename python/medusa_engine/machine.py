"""What the engine runs on, as people name it."""

from __future__ import annotations

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


def describe(device: torch.device) -> str:
    """What the speed of a step depends on: the GPU's name, or the CPU's and how many threads the kernels use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads() if _C is None else _C.cpu.num_threads()
    return f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"
