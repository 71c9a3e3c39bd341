"""Memory in huge pages: through 4 KB pages a stream of weights loses a quarter of the bandwidth to translation."""

from __future__ import annotations

import mmap
import threading

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_CHUNK = 64 << 20  # virtual: pages that are never written cost nothing
_LINE = 64

_lock = threading.Lock()
_spare = torch.empty(0, dtype=torch.uint8, device="cpu")


def huge_empty(size: int) -> Tensor:
    """uint8 (size,), uninitialised, 64-byte aligned.

    Tensors made one after the other lie one behind the other in memory, which is freed when the last of a chunk is.
    """
    global _spare
    with _lock:
        if _spare.numel() < size:
            _spare = _chunk(max(size, _CHUNK))
        taken, _spare = _spare[:size], _spare[-(-size // _LINE) * _LINE :]
    return taken


def _chunk(size: int) -> Tensor:
    length = -(-size // _HUGE_PAGE) * _HUGE_PAGE + _HUGE_PAGE
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(memory, dtype=torch.uint8)
    return data[-data.data_ptr() % _HUGE_PAGE :]
