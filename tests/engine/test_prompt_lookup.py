"""Prompt lookup guesses what followed the last time, as a search through the whole text finds it."""

import random

from medusa_engine import Medusa
from medusa_engine.decode import Decoder
from medusa_engine.prompt_lookup import Repetitions
from medusa_kernels import Tree
from tests.engine.draft_targets import RAGGED, target
from tests.engine.models import counting_folder


def repeated(text: list[int], count: int) -> list[int]:
    """Prompt lookup as a search from the end: the longest of 3, 2, 1 tokens that stood before."""
    for size in (3, 2, 1):
        for at in range(len(text) - size - 1, -1, -1):
            if text[at : at + size] == text[-size:] and at + size < len(text):
                grown = list(text)
                for i in range(count):
                    grown.append(grown[at + size + i])
                return grown[len(text) :]
    return []


def test_repetitions_are_found_as_by_a_search():
    rng = random.Random(0)
    for alphabet in (1, 2, 4, 9, 40):
        text, found = [], Repetitions()
        for _ in range(60):
            assert found.continuation(5) == repeated(text, 5)
            piece = [rng.randrange(alphabet) for _ in range(rng.randint(1, 3))]
            text += piece
            found.extend(piece)
    assert Repetitions().continuation(3) == []


def test_prompt_lookup_guesses_from_prompt_and_text():
    engine = target().with_draft("prompt-lookup")
    prompts = [list(p) for p in (RAGGED[6], RAGGED[7], [44, 44, 9])]
    decoder = Decoder(engine.model, engine.drafter, Tree.named("chain-4"), batch=3, max_seqlen=128)
    for _ in range(2):  # the second start forgets the first
        texts = [[*p, t] for p, t in zip(prompts, decoder.start(prompts, None), strict=True)]
        for _ in range(12):
            gained = decoder.step()
            for text, tokens, more in zip(texts, decoder.tree_tokens.tolist(), gained, strict=True):
                assert tokens == [text[-1], *(repeated(text, 4) or [0] * 4)]
                text += more


def test_prompt_lookup_brings_steps_where_the_text_repeats():
    """The counting model says the alphabet again and again: after the first round every guess is right."""
    engine = Medusa.from_pretrained(counting_folder(), draft="prompt-lookup", dtype="float32", tree="chain-4")
    out = engine.generate([*range(64), *range(10)], 41, ignore_eos=True)
    assert out.token_ids == [(10 + i) % 64 for i in range(41)]
    assert out.stats.tokens_per_step == 5.0
