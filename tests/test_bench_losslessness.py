"""bench.losslessness: the statistics against known numbers, and both proofs on a model whose distribution is known."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bench import losslessness
from bench.losslessness import (
    CONTROL,
    OTHER,
    chi_square,
    count,
    failures,
    measure,
    outcomes,
    places,
    table,
    total_variation,
    uniform,
)
from medusa_engine import Medusa
from tests.engine.models import counting_folder, counting_heads_folder, token

CUT = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


@pytest.fixture(scope="module")
def engine() -> Medusa:
    """One of the 64 tokens is likelier than the others by exp(3); the heads know which."""
    return Medusa.from_pretrained(counting_folder(3.0), counting_heads_folder(), dtype="float32", tree="3x2x1")


def test_chi_square_against_tables():
    """The 95% points of 1, 10 and 3 + 4 degrees of freedom: 3.841, 18.307 and 14.067."""

    def sample(cells: int, statistic: float):
        expected = torch.full((cells,), 1000.0)
        shift = torch.zeros(cells)
        shift[:2] = torch.tensor([1.0, -1.0]) * math.sqrt(statistic * 1000 / 2)
        return expected + shift, expected

    for samples in ([sample(2, 3.8415)], [sample(11, 18.307)], [sample(4, 7.0), sample(5, 7.0671)]):
        assert chi_square(*samples)["p_value"] == pytest.approx(0.05, abs=1e-4)


def test_rare_cells_are_joined():
    seen, expected = torch.tensor([50.0, 3, 0, 2]), torch.tensor([49.0, 2, 2, 2])
    found = chi_square((seen, expected))
    assert (found["cells"], found["chi_square"]) == (2, pytest.approx(1 / 49 + 1 / 6))


def test_total_variation_and_its_bound():
    p = torch.tensor([0.5, 0.3, 0.2])
    assert total_variation(torch.tensor([60, 30, 10]), p)["total_variation"] == pytest.approx(0.1)
    draws = torch.multinomial(p.expand(2000, -1), 500, replacement=True, generator=torch.Generator().manual_seed(0))
    tested = [total_variation(d.bincount(minlength=3), p) for d in draws]
    assert sum(t["total_variation"] > t["bound"] for t in tested) <= 2
    assert max(t["total_variation"] for t in tested) > tested[0]["bound"] / 2  # it is no empty bound


def test_places_are_uniform_only_for_the_distribution_drawn_from():
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(5000, 12, generator=generator) ** 3
    weights[:, 4:7] = weights[:, 4:5]  # ties
    weights[:, 11] = 0
    tokens = weights.multinomial(1, generator=generator)[:, 0].tolist()
    assert uniform(places(weights, tokens, generator))["p_value"] > 1e-3
    assert uniform(places(weights**1.2, tokens, generator))["p_value"] < 1e-6
    impossible = uniform(places(weights, [*tokens[1:], 11], generator))
    assert (impossible["p_value"], impossible["chi_square"]) == (0.0, math.inf)


def test_outcomes_and_their_probabilities(engine, monkeypatch):
    monkeypatch.setattr(losslessness, "LENGTH", 3)
    found = outcomes(engine, [token("a")], CUT)
    assert (len(found), sum(found.values())) == (27 + 13, pytest.approx(1))
    step = math.exp(3) / (math.exp(3) + 63)  # the others' logits are noise of 0.05 around 0
    spoken = tuple(map(token, "bcd"))
    assert found[spoken] == pytest.approx(step**3, rel=0.1)
    assert found[(*spoken[:2], OTHER)] == pytest.approx(step**2 * (1 - step - 2.1 / 83), rel=0.1)
    cut = outcomes(engine, [token("a")], {**CUT, "top_k": 3})
    assert sum(p for text, p in cut.items() if OTHER not in text) == pytest.approx(1)
    cold = outcomes(engine, [token("a")], {**CUT, "top_k": 1})
    assert (len(cold), cold[spoken]) == (4, pytest.approx(1))


def test_texts_are_counted_by_their_outcome(monkeypatch):
    monkeypatch.setattr(losslessness, "LENGTH", 2)
    cells = {(OTHER,): 0.2, (5, OTHER): 0.1, (6, OTHER): 0.1, (5, 1): 0.2, (5, 2): 0.2, (6, 3): 0.2}
    assert count([[7, 1], [5, 2], [6, 9], [6, 3], [5, 2], [4, 3]], cells).tolist() == [2, 0, 1, 0, 2, 1]


def test_lossless_passes_and_the_control_fails(engine, monkeypatch):
    monkeypatch.setattr(losslessness, "LENGTH", 3)
    sizes = {"tokens": 60, "seeds": 32, "openings": 2, "samples": 512}
    row = {"num_prompts": 2, "device": "here", "backend": "cpu", "dtype": "float32", "tree": "3x2x1"}
    row |= measure(engine, ["a", "k"], **sizes, cut=CUT)
    assert row["outcomes"]["samples"] == 1024
    assert row["uniform"]["tokens"] > 1000
    assert failures(row) == []
    assert json.loads(json.dumps(row)) == row
    assert "1024 samples" in table(row)


def test_failures_name_what_is_wrong():
    good, bad = {"p_value": 0.5}, {"p_value": 1e-9}
    near, far = {"total_variation": 0.01, "bound": 0.02}, {"total_variation": 0.1, "bound": 0.02}
    row = {"num_prompts": 3, "equal_texts": 3, "uniform": good, "outcomes": good | near}
    row["control"] = {**CONTROL, "uniform": bad, "outcomes": bad | far}
    assert failures(row) == []
    assert failures(row | {"equal_texts": 1}) == ["2 seeded texts differ from plain sampling's"]
    assert len(failures(row | {"uniform": bad, "outcomes": bad | far})) == 3
    assert len(failures(row | {"control": {**CONTROL, "uniform": good, "outcomes": good | near}})) == 3
