"""A draft model guesses its own greedy text, and a model's first layers are a draft model that costs no weight."""

import pytest
import torch

from medusa_engine.decode import Decoder
from medusa_kernels import Tree
from tests.engine.draft_targets import RAGGED, noisy_folder, target
from tests.engine.models import PROMPTS, random_folder


@pytest.mark.parametrize("nodes", [2, 5])
@pytest.mark.parametrize("draft", ["first-layers:1", "noisy"])
def test_a_draft_model_guesses_its_own_greedy_text(draft, nodes):
    """After any acceptance its cache is in step: the guesses are those of the draft model run on the text anew."""
    engine = target().with_draft(noisy_folder() if draft == "noisy" else draft)
    drafter = engine.drafter
    prompts = [list(p) for p in (RAGGED[0], *PROMPTS, RAGGED[5])]
    decoder = Decoder(engine.model, drafter, Tree.named(f"chain-{nodes - 1}"), batch=len(prompts), max_seqlen=128)
    decoder.cache.data.fill_(torch.nan)
    if draft == "noisy":
        decoder.draft._cache.data.fill_(torch.nan)
    texts = [[*p, t] for p, t in zip(prompts, decoder.start(prompts, None), strict=True)]
    lengths = set()
    for _ in range(10):
        gained = decoder.step()
        for b, text in enumerate(texts):
            alone = Decoder(drafter.model, None, Tree.named("root"), batch=1, max_seqlen=200)
            guesses = alone.start([text], None)
            while len(guesses) < nodes - 1:
                guesses += alone.step()[0]
            assert decoder.tree_tokens[b].tolist() == [text[-1], *guesses[: nodes - 1]]
            text += gained[b]
        lengths |= set(decoder.accept_length.tolist())
    assert {0, nodes - 1 if draft == "noisy" else 1} <= lengths


def test_a_draft_that_is_the_model_is_always_right():
    for draft in ("first-layers:2", str(random_folder())):
        out = target().with_draft(draft, tree="chain-4").generate(PROMPTS, 31)
        assert {s.tokens_per_step for s in out.stats.per_sequence} == {5.0}


def test_first_layers_copy_no_weight():
    engine = target().with_draft("first-layers:1")
    draft = engine.drafter.model
    assert draft.layers == engine.model.layers[:1]
    assert draft.lm_head is engine.model.lm_head
    assert draft.norm is engine.model.norm
    assert (draft.config.num_layers, engine.model.config.num_layers) == (1, 2)
