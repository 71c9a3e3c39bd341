"""Guesses that need no model: what followed the last time the text said the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .draft import ChainDrafter

if TYPE_CHECKING:
    from .decode import Decoder

MAX_NGRAM, MIN_NGRAM = 3, 1


class PromptLookup(ChainDrafter):
    """Prompt-lookup decoding: texts repeat their prompts and themselves."""

    auto_nodes = 11

    def join(self, decoder: Decoder) -> PromptLookupDraft:
        return PromptLookupDraft(decoder)


class Repetitions:
    """A text that grows, and what followed the latest place where its end stood before."""

    def __init__(self, *, min_ngram: int = MIN_NGRAM, max_ngram: int = MAX_NGRAM):
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where the token after it stands, at its latest place

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            # The n-gram at the end is entered only now that a token follows it: it must not find itself.
            for size in self._sizes:
                if size <= len(self._text):
                    self._after[tuple(self._text[-size:])] = len(self._text)
            self._text.append(token)

    def continuation(self, count: int) -> list[int]:
        """`count` tokens: those after the longest n-gram that ends the text, as it stands earlier; [] if none does.

        Where the earlier place is so near that its continuation runs into the end, it goes on in the guess itself.
        """
        for size in self._sizes:
            at = self._after.get(tuple(self._text[-size:])) if size <= len(self._text) else None
            if at is not None:
                period = self._text[at:]
                return [period[i % len(period)] for i in range(count)]
        return []


class PromptLookupDraft:
    """One text a sequence. It reads the step's tokens on the host, where `Medusa.generate` needs them anyway."""

    capturable = False

    def __init__(self, decoder: Decoder):
        self._outcome = decoder.outcome  # and not the decoder, whose cache would then outlive it
        self._texts: list[Repetitions] = []

    def start(self, prompts: list[list[int]]) -> None:
        self._texts = [Repetitions() for _ in prompts]
        for text, prompt, first in zip(self._texts, prompts, self._outcome.next_token.tolist(), strict=True):
            text.extend([*prompt, first])

    def propose(self) -> None:
        tokens = self._outcome.tree_tokens
        count = tokens.shape[1] - 1
        # A node has to hold some token; with nothing found, 0 is as good a guess as any.
        guesses = [text.continuation(count) or [0] * count for text in self._texts]
        tokens[:, 1:] = torch.tensor(guesses, dtype=torch.int32, device="cpu")

    def advance(self) -> None:
        for text, gained in zip(self._texts, self._outcome.emitted(), strict=True):
            text.extend(gained)
