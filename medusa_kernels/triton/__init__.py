"""Triton kernels for the four Medusa ops: the portable second backend, for NVIDIA and AMD GPUs.

A room's `calls` turns an op's checked tensors into kernel calls without looking at a value, so one list is launched,
captured in a CUDA graph, interpreted on the CPU under TRITON_INTERPRET=1, or compiled for a GPU that is not there
(`python -m bench.triton_aot`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(f"Triton cannot be imported ({error}); run `pip install triton`") from error


@dataclass(frozen=True)
class Target:
    """What a launch is planned for."""

    processors: int
    hip: bool = False
    interpreted: bool = False

    def dot_dtype(self, *tensors: Tensor) -> tl.dtype:
        """What products are made of: the tensors' 16-bit type where they share one, else fp32. Sums are fp32."""
        kinds = {tensor.dtype for tensor in tensors}
        # The interpreter multiplies bf16 as raw integers.
        if len(kinds) > 1 or self.interpreted:
            return tl.float32
        return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(kinds.pop(), tl.float32)

    def wide(self, dot_dtype: tl.dtype) -> bool:
        """Whether tiles may be large: products run on tensor cores, not in registers. Interpreted, a tile costs the
        same at any size.
        """
        return self.interpreted or dot_dtype != tl.float32

    def stages(self, wanted: int) -> int:
        """Loads in flight; AMD's shared memory of 64 KB holds two."""
        return min(wanted, 2) if self.hip else wanted


@functools.cache
def target_of(device: torch.device) -> Target:
    if device.type == "cpu":
        return Target(processors=8, interpreted=True)  # enough for the parts to be more than one
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Target(processors, hip=torch.version.hip is not None)


@dataclass(frozen=True)
class Call:
    """One launch of a kernel over a one-dimensional grid."""

    kernel: triton.JITFunction
    grid: int
    arguments: tuple
    constants: Mapping[str, object]
    warps: int = 4
    stages: int = 2

    def __call__(self) -> None:
        self.kernel[(self.grid,)](*self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages)


def launcher(calls: Callable[..., list[Call]]) -> Callable[..., None]:
    """The `launch` of an op whose kernel calls are `calls(target, *tensors)`: checked tensors, allocated outputs."""

    def launch(*tensors) -> None:
        for call in calls(target_of(tensors[0].device), *tensors):
            call()

    return launch


def block(count: int, low: int, high: int) -> int:
    """The power of two that covers `count`, between `low` and `high`."""
    return max(low, min(high, triton.next_power_of_2(count)))
