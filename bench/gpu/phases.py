"""The phases, what matters most first, and how many seconds each may take at most."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import checks, decoding, decoding_rivals, kernels
from .harness import Case, Options


class Phase(NamedTuple):
    cases: Callable[[Options], list[Case]]
    seconds: int
    case_seconds: int = 60  # after which a case counts as hanging


BUDGET, BUILD = 560, 130  # seconds of one call, and of those what building may take
PHASES = {
    "quick": Phase(checks.quick, 110),
    "decoding": Phase(decoding.cases, 130),
    "kernels": Phase(kernels.cases, 190),
    "tests": Phase(checks.tests, 220, 220),
    "decoding-rivals": Phase(decoding_rivals.cases, 120, 90),
    "kernel-rivals": Phase(kernels.rival_cases, 140, 90),
    "sanitizers": Phase(checks.sanitizers, 200, 200),
    "more-kernels": Phase(kernels.more_cases, 130),
    "model": Phase(decoding_rivals.real_model, 40),
}
# Calls in which every phase gets all of its time: one alone cannot hold them.
GROUPS = {
    "first": ("quick", "decoding", "kernels"),
    "rivals": ("decoding-rivals", "kernel-rivals", "more-kernels", "model"),
    "proof": ("tests", "sanitizers"),
}


def named(names: str) -> list[str]:
    """The phases that a list of phases and groups means, each once.

    Raises:
        ValueError: one of them is neither.
    """
    found: list[str] = []
    for name in names.split(","):
        if name not in PHASES and name not in GROUPS:
            raise ValueError(f"no phase {name!r}; there are {', '.join(PHASES)}, and the groups {', '.join(GROUPS)}")
        found += GROUPS.get(name, (name,))
    return list(dict.fromkeys(found))
