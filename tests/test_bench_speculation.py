"""bench.speculation: how often each kind of guess is kept, against counts of simulated ones."""

import torch

from bench.speculation import kept


def test_kept_is_what_simulation_counts():
    g = torch.Generator().manual_seed(3)
    p, q = (torch.randn(2, 6, generator=g, dtype=torch.float64).mul(1.5).softmax(1) for _ in range(2))
    found = kept(p, q)
    u, accept = torch.rand(2, 2, 200_000, generator=g, dtype=torch.float64)
    for row in range(2):
        target, draft = (torch.searchsorted(x[row].cumsum(0), u[row], right=True).clamp(max=5) for x in (p, q))
        counted = {
            "likeliest": target == q[row].argmax(),
            "same_number": target == draft,
            "rejection": accept[row] < p[row][draft] / q[row][draft],
        }
        for name, hits in counted.items():
            assert abs(float(hits.double().mean() - found[name][row])) < 0.005, name


def test_a_draft_that_is_the_model():
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    expected = {"likeliest": 0.5, "same_number": 1.0, "rejection": 1.0}
    assert {name: round(float(x), 12) for name, x in kept(p, p).items()} == expected
