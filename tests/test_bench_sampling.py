"""bench.sampling: what its entries say, on a model whose guesses are known."""

from __future__ import annotations

import pytest

from bench.sampling import SETTINGS, measure, table
from medusa_engine import Medusa
from tests.engine.models import counting_folder, counting_heads_folder


def test_every_mode_with_every_tree():
    engine = Medusa.from_pretrained(counting_folder(5.0), counting_heads_folder(), dtype="float32", tree="chain-4")
    engines = {"chain-4": engine, "3x2": engine.with_draft("medusa", tree="3x2")}
    entries = measure(engines, ["b", "c", "d", "e"], 20)
    assert len(entries) == 2 * len(SETTINGS)
    of = {(e["mode"], e["temperature"], e["tree"]): e for e in entries}
    greedy, deep = of["greedy", 0.0, "3x2"], of["greedy", 0.0, "chain-4"]
    assert (greedy["tokens_per_step"], greedy["tree_nodes"], greedy["of_greedy"]) == (3.0, 10, 1.0)
    assert (deep["tokens_per_step"], deep["tree_nodes"]) == (5.0, 5)
    for mode, temperature, tree in of:
        entry = of[mode, temperature, tree]
        assert entry["tokens_per_step"] == pytest.approx(
            entry["of_greedy"] * of["greedy", 0.0, tree]["tokens_per_step"]
        )
        assert entry["tokens_per_second"] > 0
        if mode != "typical":
            assert entry["equal_texts"] == 4
    assert of["lossless", 1.0, "3x2"]["of_greedy"] < of["lossless", 0.7, "3x2"]["of_greedy"] < 1
    row = {"prompts": "letters", "num_prompts": 4, "max_new_tokens": 20, "device": "here", "backend": "cpu"}
    text = table(row | {"dtype": "float32", "entries": entries})
    assert len(text.splitlines()) == 2 + len(entries)
    assert "greedy            0.0  3x2" in text
