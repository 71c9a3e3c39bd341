"""The phases, the surest and cheapest first, and how many seconds each may take at most."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import checks, decoding, decoding_rivals, kernels
from .harness import Case, Options


class Phase(NamedTuple):
    cases: Callable[[Options], list[Case]]
    seconds: int


PHASES = {
    "quick": Phase(checks.quick, 60),
    "tests": Phase(checks.tests, 110),
    "sanitizers": Phase(checks.sanitizers, 60),
    "kernels": Phase(kernels.cases, 100),
    "model": Phase(decoding_rivals.real_model, 40),
    "decoding": Phase(decoding.cases, 100),
    "decoding-rivals": Phase(decoding_rivals.cases, 90),
    "kernel-rivals": Phase(kernels.rival_cases, 300),
}
