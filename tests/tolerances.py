"""How close is close enough: the numerics ladder. No test of a backend names another tolerance.

Rung 1, exact (`torch.equal`): token ids, lengths, moved K/V rows. They are discrete or copied; there is nothing to
    round.
Rung 2, `assert_close`: floats. The error against float64 is at most twice that of plain PyTorch in the same dtype
    (another order of summation is as good as PyTorch's, not better) plus a floor, because PyTorch's own error may
    happen to be nil.
Rung 3, `assert_ranked`: top-k. Values as on rung 2; indices exact wherever no neighbour's value is within reach of
    rounding.
Rung 4, `GAP`: a draw, a threshold or an argmax compares numbers, so a discrete result is only defined if they are
    further apart than fp32 sums in another order can move them. Inputs are built with this gap; no result is compared
    without it.
"""

from __future__ import annotations

import torch
from torch import Tensor

# In units of the output dtype's epsilon, relative to the largest exact value. fp32: a sum of some thousand terms in
# another order. 16 bit: sums are fp32, so what remains is one rounding (half an epsilon) of a number that may lie on
# the other side of a tie.
FLOOR = {torch.float32: 16.0, torch.bfloat16: 1.0, torch.float16: 1.0}

# fp32 running sums over at most 10^4 tokens agree to about 1e-6 in any order; ten times that.
GAP = 1e-5

# int8 weights: a row's rounding error, relative to the row, as a share of the output's norm. 8 bits give 1/254 of the
# row's largest weight, which for Gaussian rows of width 64 and more is under 1.5% of the norm; activations rounded too
# double it.
INT8_RELATIVE_NORM = 0.03


def allowed_error(exact: Tensor, plain: Tensor, dtype: torch.dtype) -> float:
    reached = (plain.double() - exact).abs().max().item()
    return 2 * reached + FLOOR[dtype] * torch.finfo(dtype).eps * exact.abs().max().item()


def assert_close(actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    """`exact` is float64; `plain` is what PyTorch computes in the inputs' dtype."""
    assert actual.shape == exact.shape
    error = (actual.double() - exact).abs().max().item()
    allowed = allowed_error(exact, plain, actual.dtype)
    assert error <= allowed, f"error {error:.3g} is above {allowed:.3g}"


def assert_ranked(tokens: Tensor, values: Tensor, exact: Tensor, plain: Tensor) -> None:
    """`tokens` and `values` (rows, k) are the k largest of `exact` (rows, vocab), the lower index first where two are
    equal."""
    k = tokens.shape[-1]
    allowed = allowed_error(exact, plain, torch.float32)
    order = torch.sort(exact, dim=-1, descending=True, stable=True)
    assert (values.double() - order.values[:, :k]).abs().max().item() <= allowed
    assert (values.double() - exact.gather(-1, tokens.long())).abs().max().item() <= allowed
    assert all(len(set(row)) == k for row in tokens.tolist()), "a token is listed twice"
    step = order.values.diff(dim=-1).abs()
    apart = torch.ones(exact.shape, dtype=torch.bool)
    apart[:, :-1] &= step > 2 * allowed
    apart[:, 1:] &= step > 2 * allowed
    sure = apart[:, :k]
    assert torch.equal(tokens.long()[sure], order.indices[:, :k][sure])
