"""bench.parity: its rows say what `verify` found."""

from __future__ import annotations

import pytest

from bench.parity import row
from medusa_engine import Medusa
from medusa_engine.divergence import Transformers, verify
from tests.engine.models import PROMPTS, random_folder


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows(backend):
    engine = Medusa.from_pretrained(
        random_folder(), draft="first-layers:1", dtype="float32", backend=backend, tree="chain-3"
    )
    theirs = Transformers(random_folder(), engine)
    made = row(verify(engine, PROMPTS, 12, transformers=theirs, batch=2), "tokens", 3, "chain-3", engine.model.device)
    assert (made["benchmark"], made["prompts"], made["num_prompts"], made["tree"]) == ("parity", "tokens", 4, "chain-3")
    assert made["skip"] == 3
    assert (made["tree_nodes"], made["backend"], made["dtype"], made["max_new_tokens"]) == (4, backend, "float32", 12)
    assert made["equal_to_plain"] == made["equal_to_transformers"] == 4
    assert made["bitwise_equal_to_plain"] == 4 or backend == "reference"
    assert (made["differences"], made["max_relative_logit_error"] < 1e-4) == ([], True)
    alone = row(verify(engine, PROMPTS[:1], 4), "tokens", 0, "chain-3", engine.model.device)
    assert "equal_to_transformers" not in alone
