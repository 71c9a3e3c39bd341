"""What a generation would refuse, refused before any work of a command that has more than that to do."""

from __future__ import annotations

from collections.abc import Sequence

from .engine import Medusa, Prompt
from .sampling import SamplingOptions


def check(
    engine: Medusa,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    stop: str | Sequence[str] | None = None,
    ignore_eos: bool = False,
    medusa: bool = True,
    chat: bool = True,
    **sampling,
) -> None:
    """Raises the ValueError or TypeError that `Medusa.generate` would raise for any of these prompts.

    Args:
        prompts: many; the rest is `generate`'s.
    """
    _, ids = engine._encode(list(prompts), chat)
    longest = max(ids, key=len)
    options = SamplingOptions(**sampling)
    steps, _, _ = engine._prepare([longest], max_new_tokens, options, stop, ignore_eos, medusa)
    engine._steps[medusa] = steps  # bound already, for the generation that follows
