"""The phases: groups that fit into one call, and cases that can be told apart."""

from __future__ import annotations

import pytest

from bench.gpu import harness, phases


def test_groups_are_calls_in_which_every_phase_gets_its_time():
    assert sorted(name for group in phases.GROUPS.values() for name in group) == sorted(phases.PHASES)
    for group in phases.GROUPS.values():
        assert sum(phases.PHASES[name].seconds for name in group) <= phases.BUDGET - phases.BUILD
    assert phases.BUDGET + harness.GRACE < 600
    assert phases.named("proof,quick,tests") == ["tests", "sanitizers", "quick"]


@pytest.mark.parametrize("phase", phases.PHASES)
def test_cases_have_names_of_their_own(phase, options):
    names = [case.name for case in phases.PHASES[phase].cases(options)]
    assert names
    assert len(set(names)) == len(names)
