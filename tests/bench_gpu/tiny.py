"""A tiny model, the sizes of a tiny attention, and the rows of a file."""

from __future__ import annotations

import json

import torch

from bench.gpu import checks, geometry
from medusa_engine.model import Model

ATTENTION = {"n": 16, "heads": 8, "kv_heads": 2, "head_dim": 32, "prefix": 40, "batch": 2}


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tiny_model(dtype: str = "float32") -> tuple[geometry.RandomCheckpoint, Model]:
    checkpoint = geometry.RandomCheckpoint(checks.TINY, "cpu")
    device = torch.device("cpu")
    return checkpoint, Model(checkpoint, backend="reference", device=device, dtype=dtype, max_positions=128)
