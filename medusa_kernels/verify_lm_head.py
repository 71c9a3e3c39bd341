"""verify_lm_head: the LM head and the verification of a tree in one, so that the logits never reach memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _check
from ._backends import Native
from ._library import custom_op, traced
from .linear import PackedLinear, check_weight, op_weight, resolve_weights, weight_of_op
from .native import with_workspace
from .native.verify_lm_head import arguments
from .reference import verify_lm_head as reference
from .verify_tree import acceptance, check_depth_for_tracing, checked_acceptance, checked_tree, new_results

BACKENDS = {
    "reference": reference.launch,
    "cpu": Native("cpu", "verify_lm_head", arguments),
    "cuda": Native("cuda", "verify_lm_head", with_workspace("verify_lm_head", arguments)),
}


def verify_lm_head(
    hidden: Tensor,
    lm_head_weight: Tensor | PackedLinear,
    tree_tokens: Tensor,
    parents: Tensor,
    *,
    mode: str | Sequence[str] = "greedy",
    temperature: float | Sequence[float] | Tensor = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    posterior_threshold: float | Sequence[float] | Tensor = 0.09,
    posterior_alpha: float | Sequence[float] | Tensor = 0.3,
    seed: int | Sequence[int] | Tensor | None = None,
    offset: Tensor | None = None,
    max_depth: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`verify_tree` of the logits hidden @ lm_head_weight.T, which never reach memory: a tile of the vocabulary leaves
    its share of each row's argmax or softmax, and a draw makes the logits of one tile anew.

    The results are those of `linear`, then `verify_tree`, of the same backend: logits are summed in fp32 and rounded to
    hidden's dtype, and the draws' sums have the same order.

    Args:
        hidden: (batch, n, hidden_size) fp32, bf16 or fp16; row i is node i's, after the final norm.
        lm_head_weight: (vocab, hidden_size), or that packed by `pack_linear` (CPU).
        top_p, top_k: must be 1.0 and 0, off: which tokens they keep is only known once all logits are.
        tree_tokens, parents, mode, temperature, posterior_threshold, posterior_alpha, seed, offset, max_depth: as in
            `verify_tree`.
        backend: "auto", "reference", "cpu" or "cuda".

    Returns:
        accepted_nodes int32 (batch, max_depth + 1), root first and -1 padded; accept_length int32 (batch,), its nodes
        beyond the root; next_token int32 (batch,). Nothing else is written.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    for name, value, off in (("top_p", top_p, 1.0), ("top_k", top_k, 0)):
        if not isinstance(value, (int, float)) or value != off:
            raise ValueError(f"{name} must be {off}, off: truncation needs all logits, so use linear and verify_tree")
    _check.tensor("hidden", hidden, shape=(None, None, None), dtype=_check.FLOATS)
    batch = hidden.shape[0]
    _check.in_range("hidden's batch", batch, 1, 2**31 - 1)
    how = acceptance(
        batch,
        hidden.device,
        mode=mode,
        temperature=temperature,
        posterior_threshold=posterior_threshold,
        posterior_alpha=posterior_alpha,
        seed=seed,
        offset=offset,
    )
    if torch.compiler.is_compiling():
        check_depth_for_tracing(max_depth)
        weight, *packed = op_weight(lm_head_weight)
        return traced(
            "verify_lm_head", hidden, weight, tree_tokens, parents, list(how or ()), max_depth, backend, *packed
        )
    return _checked(hidden, lm_head_weight, tree_tokens, parents, how, max_depth, backend)


def _checked(hidden, lm_head_weight, tree_tokens, parents, how, max_depth, backend):
    batch, n, size = hidden.shape
    _check.in_range("hidden's number of nodes", n, 1, _check.MAX_NODES)
    _check.in_range("hidden's hidden_size", size, 1, 2**31 - 1)
    check_weight("lm_head_weight", lm_head_weight, (None, size), hidden.device)
    vocab = lm_head_weight.shape[0]
    _check.in_range("lm_head_weight's vocabulary", vocab, 1, 2**31 - 1)
    tree, results = checked_tree(batch, n, vocab, tree_tokens, parents, max_depth, hidden.device)
    launch = resolve_weights("verify_lm_head", BACKENDS, backend, hidden.device, lm_head_weight)
    launch(hidden.contiguous(), lm_head_weight, *tree, how, *results)
    return results


@custom_op("verify_lm_head")
def _op(
    hidden: Tensor,
    lm_head_weight: Tensor,
    tree_tokens: Tensor,
    parents: Tensor,
    how: list[Tensor],
    max_depth: int,
    backend: str,
    packed_shape: list[int],
    packed_dtype: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`how` is the fields of an Acceptance, or empty: every sequence is greedy."""
    weight = weight_of_op(lm_head_weight, packed_shape, packed_dtype)
    return _checked(hidden, weight, tree_tokens, parents, checked_acceptance(how), max_depth, backend)


@_op.register_fake
def _fake(hidden, lm_head_weight, tree_tokens, parents, how, max_depth, backend, *_):
    return new_results(hidden.shape[0], max_depth, hidden.device)
