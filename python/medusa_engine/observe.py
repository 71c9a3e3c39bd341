"""A generation seen from outside, step by step, for those who read the decoder's state between its steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .captured import Steps
from .decode import Decoder
from .engine import Medusa
from .output import Transcript
from .rounds import rounds
from .sampling import SamplingOptions


@dataclass(frozen=True)
class Moment:
    """Between two steps of a batch.

    Attributes:
        decoder: holds what the last step read and wrote; after the prefill, `next_token` alone.
        transcripts: one per sequence.
        texts, gained: what each sequence took of the last step: the text that became certain, and its tokens up to
            the end. "" and none for a sequence that had ended before.
    """

    decoder: Decoder
    transcripts: list[Transcript]
    texts: list[str]
    gained: list[list[int]]


def moments(
    engine: Medusa,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    options: SamplingOptions | None = None,
    *,
    stop: Sequence[str] | None = None,
    ignore_eos: bool = False,
    medusa: bool = True,
) -> Iterator[Moment]:
    """One Moment after the prefill and one after each step of the very steps that `Medusa.generate` takes.

    Takes token ids; raises as `generate` does. Between two moments the decoder's tensors stand still: they may be read,
    not written.
    """
    kept, acceptance, transcripts = engine._prepare(
        prompts, max_new_tokens, options or SamplingOptions(), stop, ignore_eos, medusa
    )
    in_turn = Steps(kept.decoder)  # a step that runs ahead would write over what is to be read
    for step in rounds(in_turn, prompts, acceptance, transcripts, max_new_tokens):
        yield Moment(kept.decoder, transcripts, step.texts, step.gained)
    engine._steps[medusa] = kept
