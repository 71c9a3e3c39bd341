"""Whole steps beside their floors, on a tiny model that accepts what is replayed."""

from __future__ import annotations

import time

import pytest
import torch

from bench.gpu import checks, decoding, geometry, replay
from medusa_engine.model import Model
from tests.engine.stand_in_gpu import StandIn


class Eager(StandIn):
    """Where a graph must not hold the launch: the reference's reads values."""

    def capture(self, work):
        return work


@pytest.fixture
def no_device(fast, monkeypatch):
    """CUDA's events and graphs as the CPU would have them: in order, and at once."""

    class Nothing:
        def __init__(self, **_):
            self.at = time.perf_counter()

        def record(self):
            self.at = time.perf_counter()

        def synchronize(self):
            """All is done already."""

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Nothing)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    monkeypatch.setattr(decoding, "Cuda", lambda device: Eager())
    for name, value in (("STEPS", 4), ("GROUPS", 5), ("ROWS_SPARE", 128)):
        monkeypatch.setattr(decoding, name, value)
    monkeypatch.setattr(decoding, "CONTEXTS", (40, 80))
    checkpoint = geometry.RandomCheckpoint(checks.TINY, "cpu")
    model = Model(checkpoint, backend="reference", device=torch.device("cpu"), dtype="float32", max_positions=1024)
    monkeypatch.setattr(decoding, "model_of", lambda name: (checkpoint, model))


def test_steps_are_measured_beside_their_floors(no_device):
    rows = list(decoding.measure("vicuna-7b", 2, 40, own_lm_heads=False))
    assert [row["decoding"] for row in rows] == ["plain", *(f"{name}, acceptance replayed" for name in
                                                           replay.TOKENS_PER_STEP)]  # fmt: skip
    plain, first, second = rows
    assert plain["tokens_per_step"] == 1
    assert first["tokens_per_step"] == pytest.approx(2.565, abs=0.1)
    assert second["tokens_per_step"] == pytest.approx(3.47, abs=0.1)
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(2e6 * row["tokens_per_step"] / row["step_us"])
        assert row["times_floor"] == pytest.approx(row["step_us"] / row["floor_us"])
        assert row["times_weight_floor"] == pytest.approx(row["step_us"] / row["weight_floor_us"])
    weights, kv = geometry.weight_bytes(checks.TINY), geometry.kv_bytes(checks.TINY, 2 * 40)
    heads = geometry.heads_bytes(checks.TINY, own_lm_heads=False)
    assert plain["floor_us"] == pytest.approx((weights + kv) / 1e4)
    assert first["floor_us"] == pytest.approx((weights + kv + heads) / 1e4)
    assert first["overhead"] == pytest.approx(first["step_us"] / plain["step_us"])
    assert first["speedup"] == pytest.approx(first["tokens_per_second"] / plain["tokens_per_second"])


def test_a_context_that_does_not_fit_is_skipped(no_device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 10, 1 << 30))
    (row,) = decoding.measure("vicuna-7b", 1, 80, own_lm_heads=False)
    assert row["benchmark"] == "skipped"
