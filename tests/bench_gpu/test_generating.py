"""Graphs ahead of the host, on a tape: the same text, and a difference or a wait is found."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from bench.gpu import decoding, generating
from medusa_engine import Medusa
from tests.engine.stand_in_gpu import StandIn, native_launches_on_tape


@pytest.mark.parametrize(("draft", "tree"), generating.SOURCES)
def test_generating_is_the_same_ahead_of_the_host(draft, tree, monkeypatch):
    """With the CPU's kernels on a tape for a graph."""
    monkeypatch.setattr(generating, "NEW_TOKENS", 15)
    engines = []

    def engine_of(*source, **options):
        engines.append(generating.engine(*source, device="cpu", backend="cpu", **options))
        engines[-1]._gpu = StandIn()
        return engines[-1]

    with native_launches_on_tape():
        assert generating.differs(engine_of, draft, tree) == ""
    assert [engine._gpu.captured for engine in engines] == [1, 2]


@pytest.mark.parametrize(("draft", "tree"), generating.SOURCES)
def test_a_wait_for_the_host_is_found(draft, tree, monkeypatch):
    modes = []
    monkeypatch.setattr(generating, "Cuda", lambda device: StandIn())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with native_launches_on_tape():
        assert generating.waits_for_the_host(draft, tree, device="cpu") == ""
        assert modes == ["error", "default"] * 2

        def refused(self, b):
            raise RuntimeError("called a synchronizing CUDA operation")

        monkeypatch.setattr(decoding.Decoder, "retire", refused)
        assert "synchronizing" in generating.waits_for_the_host(draft, tree, device="cpu")
    assert modes[-1] == "default"


def test_a_generation_that_differs_is_found(monkeypatch):
    monkeypatch.setattr(generating, "NEW_TOKENS", 6)
    engine_of = functools.partial(generating.engine, device="cpu", backend="cpu")
    generate = Medusa.generate
    for field, wrong in (("token_ids", [[1]] * 3), ("text", [""] * 3), ("finish_reason", ["eos"] * 3)):
        monkeypatch.setattr(
            Medusa, "generate", lambda *a, f=field, w=wrong, **k: dataclasses.replace(generate(*a, **k), **{f: w})
            if k else generate(*a)
        )  # fmt: skip
        assert "than steps in turn" in generating.differs(engine_of, "medusa", "4x2x2")
