"""What a phase is run with, and a clock that always says the same."""

from __future__ import annotations

import time

import pytest

from bench import _timing
from bench.gpu import harness


@pytest.fixture
def options(tmp_path):
    return harness.Options(tmp_path / "rows.jsonl", tmp_path, time.time() + 60)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(_timing, "bandwidth", lambda device: 1e10)
    monkeypatch.setattr(_timing, "flops", lambda device: 1e11)
    monkeypatch.setattr(_timing, "medians", lambda calls, device, seconds: dict.fromkeys(calls, 1e-4))
