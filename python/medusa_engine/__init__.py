"""The thin decoding driver: a Llama-family model, its Medusa heads and a tree, over the ops of `medusa_kernels`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Medusa
    from .output import Chunk, Output, Stats

__all__ = ["Chunk", "Medusa", "Output", "Stats"]


def __getattr__(name: str) -> Any:
    """Imports on first use: importing PyTorch takes seconds, and `medusa --help` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".engine", __name__), name)
