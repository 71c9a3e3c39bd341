"""What a generation returns: texts cut exactly where they end, and what the steps brought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .tokenizer import StreamDecoder, Tokenizer


@dataclass
class Stats:
    """Of one sequence, or the sums over several. The prefill emits each sequence's first token and is no step."""

    new_tokens: int = 0
    steps: int = 0
    accepted: int = 0  # sum of accept_length + 1 over the steps, also of tokens past the end
    sequences: int = 1
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    per_sequence: list[Stats] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        """The paper's acceptance rate; 1.0 for plain decoding and where the prefill's token was the only one."""
        return self.accepted / self.steps if self.steps else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens that steps brought, over the time the steps took; 0.0 without a step."""
        return (self.new_tokens - self.sequences) / self.decode_seconds if self.steps else 0.0

    @classmethod
    def of_many(cls, stats: Sequence[Stats], prefill_seconds: float, decode_seconds: float) -> Stats:
        total = cls(sequences=len(stats), prefill_seconds=prefill_seconds, decode_seconds=decode_seconds)
        for one in stats:
            total.new_tokens += one.new_tokens
            total.steps += one.steps
            total.accepted += one.accepted
        total.per_sequence = list(stats)
        return total


@dataclass(frozen=True)
class Output:
    """One prompt: a str, a list of ids and one of "eos", "stop", "length". Many: a list of each."""

    text: str | list[str]
    token_ids: list[int] | list[list[int]]
    finish_reason: str | list[str]
    stats: Stats


@dataclass(frozen=True)
class Chunk:
    """What one step of a stream brought; the first is the prefill's token."""

    text: str
    token_ids: list[int]
    accept_length: int


class Transcript:
    """One sequence's tokens and text as they arrive, ended at EOS, a stop string or the token limit, whichever is
    first.

    Attributes:
        token_ids: with the EOS or the token that completed the stop string.
        finish_reason: "eos", "stop" or "length"; None while it goes on.
    """

    def __init__(self, tokenizer: Tokenizer, *, eos_token_ids: Sequence[int], stop: Sequence[str], max_new_tokens: int):
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._decoder = StreamDecoder(tokenizer)
        self._eos, self._stop, self._limit = frozenset(eos_token_ids), stop, max_new_tokens
        self._text = ""
        self._shown = 0

    @property
    def text(self) -> str:
        """All text so far, also what `push` still holds back."""
        return self._text

    def push(self, tokens: Sequence[int]) -> str:
        """Takes a step's tokens, up to the end, and returns the text that is certain now."""
        for token in tokens:
            self.token_ids.append(token)
            if token in self._eos:
                self._finish("eos")
            elif self._add(self._decoder.push([token])) or (self._stop and self._stops_in(self._decoder.pending())):
                self.finish_reason = "stop"
            elif len(self.token_ids) == self._limit:
                self._finish("length")
            if self.finish_reason:
                break
        certain = len(self._text) if self.finish_reason else len(self._text) - self._possible_stop()
        fresh = self._text[self._shown : certain]
        self._shown = max(self._shown, certain)
        return fresh

    def _finish(self, reason: str) -> None:
        self.finish_reason = "stop" if self._add(self._decoder.flush()) else reason

    def _add(self, piece: str) -> bool:
        """Appends text; cuts it at the first stop string and returns whether there was one."""
        overlap = max((len(s) for s in self._stop), default=1) - 1
        start = max(0, len(self._text) - overlap)
        self._text += piece
        found = [at for s in self._stop if (at := self._text.find(s, start)) >= 0]
        if found:
            self._text = self._text[: min(found)]
        return bool(found)

    def _stops_in(self, pending: str) -> bool:
        """Whether text that later tokens may still change completes a stop string now; if so, it is cut there."""
        text = self._text
        if pending and self._add(pending):
            return True
        self._text = text
        return False

    def _possible_stop(self) -> int:
        """Length of the longest tail that may still grow into a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for size in range(min(longest, len(self._text)), 0, -1):
            if any(s.startswith(self._text[-size:]) for s in self._stop):
                return size
        return 0
