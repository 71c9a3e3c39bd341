"""The thin decoding driver: a Llama-family model, its Medusa heads and a tree, over the ops of `medusa_kernels`."""

from .engine import Medusa
from .output import Chunk, Output, Stats

__all__ = ["Chunk", "Medusa", "Output", "Stats"]
