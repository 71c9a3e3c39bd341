"""Bytes of the published models' shapes."""

from __future__ import annotations

import pytest

from bench import ops
from bench.gpu import checks, geometry
from tests.bench_gpu.tiny import tiny_model


def test_bytes_are_those_of_the_published_models():
    assert geometry.weight_bytes(geometry.VICUNA_7B) == pytest.approx(13.2e9, rel=0.01)
    assert geometry.weight_bytes(geometry.LLAMA3_8B) == pytest.approx(15.0e9, rel=0.01)
    assert geometry.kv_bytes(geometry.VICUNA_7B, 1) == 2**19
    assert geometry.heads_bytes(geometry.VICUNA_7B, own_lm_heads=True) == pytest.approx(1.48e9, rel=0.01)


def test_weight_bytes_are_those_the_model_holds():
    _, model = tiny_model("bfloat16")
    matrices = [m for layer in model.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    assert geometry.weight_bytes(checks.TINY) == sum(map(ops.storage, [*matrices, model.lm_head]))
