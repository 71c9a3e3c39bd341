"""The loop around a decoder's steps: who gains what, who has ended, and when all have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from medusa_kernels.verify_tree import Acceptance

from .captured import Steps
from .output import Transcript


@dataclass(frozen=True)
class Round:
    """What the prefill, or a step, brought each sequence.

    Attributes:
        emitted: how many tokens, those past the end counted; 0 for a sequence that had ended before.
        gained: its tokens up to the end. texts: the text that became certain by them.
    """

    emitted: list[int]
    gained: list[list[int]]
    texts: list[str]


def rounds(
    steps: Steps,
    prompts: Sequence[list[int]],
    acceptance: Acceptance | None,
    transcripts: Sequence[Transcript],
    max_new_tokens: int,
) -> Iterator[Round]:
    """One Round for the prefill and one for each step, until every transcript has its finish reason."""
    tokens = steps.start(prompts, acceptance)
    going = [True] * len(transcripts)
    while True:
        before = [len(t.token_ids) for t in transcripts]
        texts = [t.push(more) if on else "" for t, more, on in zip(transcripts, tokens, going, strict=True)]
        gained = [t.token_ids[start:] for t, start in zip(transcripts, before, strict=True)]
        yield Round([len(more) if on else 0 for more, on in zip(tokens, going, strict=True)], gained, texts)
        for b, transcript in enumerate(transcripts):
            if going[b] and transcript.finish_reason is not None:
                going[b] = False
                steps.decoder.retire(b)
        if not any(going):
            return
        # A step brings each sequence a token at least.
        tokens = steps.next(max_new_tokens - min(len(t.token_ids) for t in transcripts if t.finish_reason is None))
