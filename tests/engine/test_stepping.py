"""Trees grown from measured ranks."""

import itertools

import torch

from medusa_engine.stepping import best_paths, tokens_per_step

ABSENT = 9


def ranks(*columns):
    """One conversation from the ranks of both heads at each position."""
    return torch.tensor(columns).T


def test_tokens_per_step_walks_as_decoding_does():
    one = ranks((0, 0), (0, 1), (1, 0), (0, 0), (ABSENT, 0))
    assert tokens_per_step([one], []) == 1.0
    # (0,) is right at position 0: the step emits two tokens and the next begins at position 2.
    assert tokens_per_step([one], [(0,)]) == 5 / 3
    assert tokens_per_step([one], [(0,), (0, 0)]) == 5 / 2


def test_a_path_counts_only_where_its_prefix_is_in_the_tree():
    assert tokens_per_step([ranks((1, 0), (ABSENT, ABSENT))], [(0,), (0, 0)]) == 1.0


def test_best_paths_are_prefix_closed_and_worth_most():
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(0, 4, (3, 30), generator=generator) for _ in range(20)]
    paths = best_paths(data, 12, absent=3)
    assert len(paths) == 12
    for size in range(1, 13):
        tree = set(paths[:size])
        assert all(path[:-1] in tree for path in tree if len(path) > 1)
    assert all(rank < 3 for rank in itertools.chain(*paths))


def test_the_best_single_path_beats_every_other():
    generator = torch.Generator().manual_seed(1)
    data = [torch.randint(0, 3, (2, 50), generator=generator) for _ in range(10)]
    found = best_paths(data, 1, absent=ABSENT, rounds=1)
    frequency = {r: sum(int((d[0] == r).sum()) for d in data) for r in range(3)}
    assert found == [(max(frequency, key=frequency.get),)]


def test_absent_ranks_never_enter_a_tree():
    assert best_paths([ranks((ABSENT, 0), (0, ABSENT))], 5, absent=ABSENT) == [(0,)]
