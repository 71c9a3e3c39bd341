"""Interleaved medians: every variant is timed once per round, so that a busy moment of the machine hits all of them
alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache

import torch

EVICT_BYTES = {"cpu": 96 << 20, "cuda": 512 << 20}  # above the last-level caches
HEAD_START_CYCLES = 1_000_000  # half a millisecond at a GPU's clock


def medians(calls: Mapping[str, Callable[[], None]], device: str, *, seconds: float = 0.5) -> dict[str, float]:
    """Seconds per call: the median over rounds A B C A B C ... from a cold cache."""
    return {name: statistics.median(times) for name, times in samples(calls, device, seconds).items()}


def samples(calls: Mapping[str, Callable[[], None]], device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of every call of 5 to 200 rounds."""
    for call in calls.values():  # warm up: lazy imports, page faults, clocks
        call()
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    rounds = 0
    while rounds < 5 or (rounds < 200 and time.perf_counter() < end):
        for name, call in calls.items():
            evict(device)
            taken[name].append(_once(call, device))
        rounds += 1
    return taken


def _once(call: Callable[[], None], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) / 1e9
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)  # the host launches meanwhile: its time is not between the events
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def evict(device: str) -> None:
    """Fills the caches with something else: a decoding step finds its weights and K/V in memory, not in a cache.

    It only reads, because lines that it wrote would have to go to memory while the call that is timed runs.
    """
    buffer, result = _buffer(device)
    torch.sum(buffer, 0, out=result)


@cache
def _buffer(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    buffer = torch.ones(EVICT_BYTES[device] // 4, dtype=torch.float32, device=device)
    return buffer, torch.zeros((), device=device)


@cache
def bandwidth(device: str) -> float:
    """Bytes per second, the better of reading and of copying a buffer far larger than the caches, in this very run."""
    size = {"cpu": 256 << 20, "cuda": 4 << 30}[device]
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = samples({"read": lambda: source.sum(), "copy": lambda: target.copy_(source)}, device, seconds=0.3)
    return max(size / min(times["read"]), 2 * size / min(times["copy"]))


@cache
def flops(device: str) -> float:
    """The most operations per second of PyTorch's matrix product: fp32 on the CPU, bf16 on the GPU."""
    n, dtype = {"cpu": (1024, torch.float32), "cuda": (8192, torch.bfloat16)}[device]
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * n**3 / min(samples({"product": lambda: torch.mm(a, b, out=out)}, device, seconds=0.5)["product"])
