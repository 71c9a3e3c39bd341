"""draft_heads: the Medusa heads at one hidden row per sequence, down to their top-k tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check
from ._backends import Lazy, Native
from ._library import custom_op, traced
from .linear import PackedLinear, check_weight, op_weight, resolve_weights, weight_of_op
from .native import with_workspace
from .native.draft_heads import arguments
from .reference import draft_heads as reference

BACKENDS = {
    "reference": reference.launch,
    "cpu": Native("cpu", "draft_heads", arguments),
    "cuda": Native("cuda", "draft_heads", with_workspace("draft_heads", arguments)),
    "triton": Lazy("medusa_kernels.triton.draft_heads"),
}


def draft_heads(
    hidden: Tensor,
    block_weight: Tensor | PackedLinear,
    block_bias: Tensor | None,
    lm_head_weight: Tensor | PackedLinear,
    top_k: int,
    *,
    token_map: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Head h's `top_k` most probable tokens at offset h + 2, without the (batch, heads, vocab) logits reaching memory.

    Each head applies `layers` residual blocks x + silu(W x + b) (Medusa, section 2.1), then an LM head.

    Args:
        hidden: (batch, hidden_size), the last accepted node's row after the base's final norm: what its LM head reads.
        block_weight: (heads, layers, hidden_size, hidden_size) fp32, bf16 or fp16, or that packed by `pack_linear`.
        block_bias: (heads, layers, hidden_size) fp32, bf16 or fp16, or None.
        lm_head_weight: (vocab, hidden_size) shared by the heads, or (heads, vocab, hidden_size) one each, fp32, bf16 or
            fp16; or packed.
        top_k: 1 to vocab. Equal scores: the lower draft id first.
        token_map: int32 (vocab,), draft id to base id, for a reduced draft vocabulary; None: the ids are the same.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        draft_tokens int32 (batch, heads, top_k), base ids by falling probability, and
        logprobs float32 (batch, heads, top_k), natural logarithms over the draft vocabulary. Nothing else is written.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    if torch.compiler.is_compiling():
        (blocks, *packed_blocks), (lm_head, *packed_lm_head) = op_weight(block_weight), op_weight(lm_head_weight)
        plain = (hidden, blocks, block_bias, lm_head, top_k, token_map, backend)
        return traced("draft_heads", *plain, *packed_blocks, *packed_lm_head)
    return _checked(hidden, block_weight, block_bias, lm_head_weight, top_k, token_map, backend)


def _checked(hidden, block_weight, block_bias, lm_head_weight, top_k, token_map, backend):
    _check.tensor("hidden", hidden, shape=(None, None), dtype=_check.FLOATS)
    batch, size = hidden.shape
    _check.in_range("hidden's batch", batch, 1, 2**31 - 1)
    _check.in_range("hidden's hidden_size", size, 1, 2**31 - 1)
    check_weight("block_weight", block_weight, (None, None, size, size), hidden.device)
    heads, layers = block_weight.shape[:2]
    _check.in_range("block_weight's number of heads", heads, 1, 2**31 - 1)
    if block_bias is not None:
        _check.tensor("block_bias", block_bias, shape=(heads, layers, size), dtype=_check.FLOATS, device=hidden.device)
        block_bias = block_bias.contiguous()
    own = len(getattr(lm_head_weight, "shape", ())) == 3
    check_weight("lm_head_weight", lm_head_weight, (heads, None, size) if own else (None, size), hidden.device)
    vocab = lm_head_weight.shape[-2]
    _check.in_range("lm_head_weight's vocabulary", vocab, 1, 2**31 - 1)
    top_k = _check.integer("top_k", top_k, 1, vocab)
    if token_map is not None:
        _check.tensor("token_map", token_map, shape=(vocab,), dtype=torch.int32, device=hidden.device)
        if _check.values_wanted(hidden.device):
            _check.all_between("token_map", token_map, 0, 2**31 - 1)
        token_map = token_map.contiguous()
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    launch = resolve_weights("draft_heads", BACKENDS, backend, hidden.device, block_weight, lm_head_weight)
    draft_tokens = torch.empty(batch, heads, top_k, dtype=torch.int32, device=hidden.device)
    logprobs = torch.empty(batch, heads, top_k, dtype=torch.float32, device=hidden.device)
    launch(hidden, block_weight, block_bias, lm_head_weight, token_map, top_k, draft_tokens, logprobs)
    return draft_tokens, logprobs


@custom_op("draft_heads")
def _op(
    hidden: Tensor,
    block_weight: Tensor,
    block_bias: Tensor | None,
    lm_head_weight: Tensor,
    top_k: int,
    token_map: Tensor | None,
    backend: str,
    packed_block_shape: list[int],
    packed_block_dtype: str,
    packed_lm_head_shape: list[int],
    packed_lm_head_dtype: str,
) -> tuple[Tensor, Tensor]:
    block_weight = weight_of_op(block_weight, packed_block_shape, packed_block_dtype)
    lm_head_weight = weight_of_op(lm_head_weight, packed_lm_head_shape, packed_lm_head_dtype)
    return _checked(hidden, block_weight, block_bias, lm_head_weight, top_k, token_map, backend)


@_op.register_fake
def _fake(hidden, block_weight, block_bias, lm_head_weight, top_k, token_map, backend, packed_block_shape, *_):
    shape = (hidden.shape[0], (packed_block_shape or block_weight.shape)[0], top_k)
    return hidden.new_empty(shape, dtype=torch.int32), hidden.new_empty(shape, dtype=torch.float32)
