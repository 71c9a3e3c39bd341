"""Malformed calls: each raises TypeError or ValueError whose message names the argument, what it was and what it must
be.

A row is an op, the arguments that differ from a good call of it, the exception, and the words its message must hold.
"""

# ruff: noqa: E501 - a table: one malformed call per line
from __future__ import annotations

import numpy as np
import pytest
import torch

import medusa_kernels as mk
from medusa_kernels import Tree

BATCH, N, HEADS, KV, DIM, SEQ, VOCAB, HIDDEN = 2, 7, 4, 2, 8, 20, 11, 16
TREE = Tree.from_choices([[0], [1], [2], [0, 0], [1, 0], [2, 0]])


def i32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def good(op: str) -> dict:
    """Arguments of a call that works."""
    cache = torch.zeros(BATCH, SEQ, KV, DIM)
    return {
        "tree_attention": {
            "q": torch.zeros(BATCH, N, HEADS, DIM), "k_cache": cache, "v_cache": cache.clone(), "cache_seqlens": i32(0, 5),
            "tree_mask": TREE.mask_words,
        },
        "draft_heads": {
            "hidden": torch.zeros(BATCH, HIDDEN), "block_weight": torch.zeros(3, 1, HIDDEN, HIDDEN), "block_bias": None,
            "lm_head_weight": torch.zeros(VOCAB, HIDDEN), "top_k": 3,
        },
        "verify_tree": {
            "logits": torch.zeros(BATCH, N, VOCAB), "tree_tokens": torch.zeros(BATCH, N, dtype=torch.int32),
            "parents": TREE.parents,
        },
        "verify_lm_head": {
            "hidden": torch.zeros(BATCH, N, HIDDEN), "lm_head_weight": torch.zeros(VOCAB, HIDDEN),
            "tree_tokens": torch.zeros(BATCH, N, dtype=torch.int32), "parents": TREE.parents,
        },
        "compact_kv": {
            "kv_cache": torch.zeros(3, 2, BATCH, SEQ, KV, DIM), "accepted_nodes": i32([0, 2, 5], [0, -1, -1]),
            "accept_length": i32(2, 0), "cache_seqlens": i32(0, 5),
        },
        "rms_norm": {"x": torch.zeros(3, 8), "weight": torch.zeros(8), "eps": 1e-5},
        "rotary_append": {
            "q": torch.zeros(BATCH, N, HEADS, DIM), "k": torch.zeros(BATCH, N, KV, DIM), "v": torch.zeros(BATCH, N, KV, DIM),
            "cos": torch.zeros(SEQ, DIM // 2), "sin": torch.zeros(SEQ, DIM // 2), "k_cache": cache,
            "v_cache": cache.clone(), "cache_seqlens": i32(0, 5), "depths": TREE.depths,
        },
        "silu_mul": {"gate_up": torch.zeros(3, 8)},
        "linear": {"x": torch.zeros(3, 8), "weight": torch.zeros(5, 8)},
        "pack_linear": {"weight": torch.zeros(5, 8)},
    }[op]  # fmt: skip


NO_SELF = TREE.mask_words.clone()
NO_SELF[3] = 1
PAST_N = TREE.mask_words.clone()
PAST_N[2] |= 1 << 9
SIGN_BIT = TREE.mask_words.clone()
SIGN_BIT[2] |= -(2**63)
CACHE = torch.zeros(BATCH, SEQ, KV, DIM)
Z = torch.zeros

ROWS = [
    # tree_attention
    ("tree_attention", {"q": [1.0]}, TypeError, "q must be a torch.Tensor, not list"),
    ("tree_attention", {"q": Z(BATCH, N, DIM)}, ValueError, "q must have shape (any, any, any, any), not (2, 7, 8)"),
    ("tree_attention", {"q": Z(BATCH, N, HEADS, DIM, dtype=torch.float64)}, TypeError, "q must have dtype float32 or bfloat16 or float16, not float64"),
    ("tree_attention", {"q": Z(0, N, HEADS, DIM)}, ValueError, "q's batch must be between 1 and"),
    ("tree_attention", {"q": Z(BATCH, 0, HEADS, DIM)}, ValueError, "q's number of nodes must be between 1 and 256, not 0"),
    ("tree_attention", {"q": Z(BATCH, 257, HEADS, DIM)}, ValueError, "q's number of nodes must be between 1 and 256, not 257"),
    ("tree_attention", {"q": Z(BATCH, N, HEADS, 257)}, ValueError, "q's head_dim must be between 1 and 256, not 257"),
    ("tree_attention", {"q": Z(BATCH, N, 3, DIM)}, ValueError, "q's number of heads must be a multiple of k_cache's, not 3 against 2"),
    ("tree_attention", {"k_cache": Z(BATCH, SEQ, KV, 9)}, ValueError, "k_cache must have shape (2, any, any, 8), not (2, 20, 2, 9)"),
    ("tree_attention", {"k_cache": Z(3, SEQ, KV, DIM)}, ValueError, "k_cache must have shape (2, any, any, 8), not (3, 20, 2, 8)"),
    ("tree_attention", {"v_cache": Z(BATCH, SEQ + 1, KV, DIM)}, ValueError, "v_cache must have shape (2, 20, 2, 8), not (2, 21, 2, 8)"),
    ("tree_attention", {"v_cache": CACHE.half()}, TypeError, "v_cache must have dtype float32, not float16"),
    ("tree_attention", {"v_cache": Z(BATCH, KV, SEQ, DIM).transpose(1, 2)}, ValueError, "v_cache must have k_cache's strides (320, 16, 8, 1), not (320, 8, 160, 1)"),
    ("tree_attention", {"k_cache": Z(BATCH, SEQ, DIM, KV).transpose(2, 3)}, ValueError, "k_cache must be contiguous in its last 1 dimension(s); its strides are"),
    ("tree_attention", {"cache_seqlens": torch.tensor([0, 5])}, TypeError, "cache_seqlens must have dtype int32, not int64"),
    ("tree_attention", {"cache_seqlens": i32(1, 2, 3)}, ValueError, "cache_seqlens must have shape (2,), not (3,)"),
    ("tree_attention", {"cache_seqlens": i32(0, 14)}, ValueError, "cache_seqlens must hold values between 0 and 13; it holds 14"),
    ("tree_attention", {"cache_seqlens": i32(-1, 2)}, ValueError, "cache_seqlens must hold values between 0 and 13; it holds -1"),
    ("tree_attention", {"k_cache": Z(BATCH, 5, KV, DIM), "v_cache": Z(BATCH, 5, KV, DIM)}, ValueError, "k_cache has max_seqlen 5; it must be at least 7"),
    ("tree_attention", {"tree_mask": TREE.mask_words.int()}, TypeError, "tree_mask must have dtype int64, not int32"),
    ("tree_attention", {"tree_mask": torch.ones(N, 2, dtype=torch.int64)}, ValueError, "tree_mask must have shape (7, 1) or (2, 7, 1), not (7, 2)"),
    ("tree_attention", {"tree_mask": NO_SELF}, ValueError, "tree_mask must let every node see itself; bit 3 of row 3 is clear"),
    ("tree_attention", {"tree_mask": PAST_N}, ValueError, "tree_mask must have every bit from 7 up clear (n is 7); row 2 has one set"),
    ("tree_attention", {"tree_mask": SIGN_BIT}, ValueError, "tree_mask must have every bit from 7 up clear (n is 7)"),
    ("tree_attention", {"scale": torch.nan}, ValueError, "scale must be finite in fp32, not nan"),
    ("tree_attention", {"scale": 1e300}, ValueError, "scale must be finite in fp32, not 1e+300"),
    ("tree_attention", {"scale": 10**400}, ValueError, "scale must be finite in fp32, not 1000000"),
    ("tree_attention", {"scale": "big"}, TypeError, "scale must be a number, not str"),
    ("tree_attention", {"backend": "gpu"}, ValueError, "backend must be 'auto' or one of 'reference', 'cpu', 'cuda', 'triton', not 'gpu'"),
    ("tree_attention", {"backend": None}, ValueError, "backend must be 'auto' or one of"),
    # draft_heads
    ("draft_heads", {"hidden": Z(BATCH, N, HIDDEN)}, ValueError, "hidden must have shape (any, any), not (2, 7, 16)"),
    ("draft_heads", {"hidden": Z(BATCH, 0), "block_weight": Z(3, 1, 0, 0)}, ValueError, "hidden's hidden_size must be between 1"),
    ("draft_heads", {"block_weight": Z(3, HIDDEN, HIDDEN)}, ValueError, "block_weight must have shape (any, any, 16, 16), not (3, 16, 16)"),
    ("draft_heads", {"block_weight": Z(0, 1, HIDDEN, HIDDEN)}, ValueError, "block_weight's number of heads must be between 1"),
    ("draft_heads", {"block_weight": Z(3, 1, HIDDEN, 2 * HIDDEN)[..., ::2]}, ValueError, "block_weight must be contiguous in its last 4"),
    ("draft_heads", {"block_bias": Z(3, HIDDEN)}, ValueError, "block_bias must have shape (3, 1, 16), not (3, 16)"),
    ("draft_heads", {"lm_head_weight": None}, TypeError, "lm_head_weight must be a torch.Tensor, not NoneType"),
    ("draft_heads", {"lm_head_weight": Z(VOCAB, HIDDEN + 1)}, ValueError, "lm_head_weight must have shape (any, 16), not (11, 17)"),
    ("draft_heads", {"lm_head_weight": Z(2, VOCAB, HIDDEN)}, ValueError, "lm_head_weight must have shape (3, any, 16), not (2, 11, 16)"),
    ("draft_heads", {"top_k": 0}, ValueError, "top_k must be between 1 and 11, not 0"),
    ("draft_heads", {"top_k": 12}, ValueError, "top_k must be between 1 and 11, not 12"),
    ("draft_heads", {"top_k": 2.0}, TypeError, "top_k must be an int, not float"),
    ("draft_heads", {"top_k": True}, TypeError, "top_k must be an int, not bool"),
    ("draft_heads", {"token_map": torch.zeros(VOCAB)}, TypeError, "token_map must have dtype int32, not float32"),
    ("draft_heads", {"token_map": torch.zeros(VOCAB + 1, dtype=torch.int32)}, ValueError, "token_map must have shape (11,), not (12,)"),
    ("draft_heads", {"token_map": torch.full((VOCAB,), -1, dtype=torch.int32)}, ValueError, "token_map must hold values between 0 and 2147483647; it holds -1"),
    # verify_tree
    ("verify_tree", {"logits": Z(N, VOCAB)}, ValueError, "logits must have shape (any, any, any), not (7, 11)"),
    ("verify_tree", {"logits": Z(BATCH, N, 0)}, ValueError, "logits' vocabulary must be between 1 and"),
    ("verify_tree", {"logits": Z(BATCH, 257, VOCAB)}, ValueError, "logits' number of nodes must be between 1 and 256, not 257"),
    ("verify_tree", {"tree_tokens": torch.zeros(BATCH, N, dtype=torch.int64)}, TypeError, "tree_tokens must have dtype int32, not int64"),
    ("verify_tree", {"tree_tokens": torch.zeros(BATCH, N - 1, dtype=torch.int32)}, ValueError, "tree_tokens must have shape (2, 7), not (2, 6)"),
    ("verify_tree", {"tree_tokens": torch.full((BATCH, N), VOCAB, dtype=torch.int32)}, ValueError, "tree_tokens must hold values between 0 and 10; it holds 11"),
    ("verify_tree", {"tree_tokens": torch.full((BATCH, N), -1, dtype=torch.int32)}, ValueError, "tree_tokens must hold values between 0 and 10; it holds -1"),
    ("verify_tree", {"parents": TREE.parents.tolist()}, TypeError, "parents must be a torch.Tensor, not list"),
    ("verify_tree", {"parents": i32()}, ValueError, "parents must have shape (7,) or (2, 7), not (0,)"),
    ("verify_tree", {"parents": i32(0, 0, 0, 0, 1, 2, 3)}, ValueError, "parents must be -1 at node 0, the root"),
    ("verify_tree", {"parents": i32(-1, 0, 0, 4, 3, 2, 3)}, ValueError, "parents must name an earlier node for every node but the root"),
    ("verify_tree", {"parents": i32(-1, 0, -1, 0, 1, 2, 3)}, ValueError, "parents must name an earlier node for every node but the root"),
    ("verify_tree", {"mode": "nucleus"}, ValueError, "mode must be one of 'greedy', 'typical', 'lossless', not 'nucleus'"),
    ("verify_tree", {"mode": ["greedy"] * 3}, ValueError, "mode must be one value or one per sequence (2), not 3"),
    ("verify_tree", {"mode": 2}, TypeError, "mode must be a str or one per sequence, not int"),
    ("verify_tree", {"temperature": -0.5}, ValueError, "temperature must be finite, at least 0, not -0.5"),
    ("verify_tree", {"temperature": torch.inf}, ValueError, "temperature must be finite, at least 0, not inf"),
    ("verify_tree", {"temperature": 1e-30}, ValueError, "temperature must be 0 (greedy) or at least 1e-05, not 1e-30"),
    ("verify_tree", {"temperature": [1.0, 1.0, 1.0]}, ValueError, "temperature must be one value or one per sequence (2), not shape (3,)"),
    ("verify_tree", {"temperature": "warm"}, TypeError, "temperature must be a number or one per sequence, not 'warm'"),
    ("verify_tree", {"top_p": 0.0}, ValueError, "top_p must be finite, above 0 and at most 1, not 0.0"),
    ("verify_tree", {"top_p": 1.5}, ValueError, "top_p must be finite, above 0 and at most 1, not 1.5"),
    ("verify_tree", {"top_p": torch.nan}, ValueError, "top_p must be finite, above 0 and at most 1, not nan"),
    ("verify_tree", {"top_k": -1}, ValueError, "top_k must be finite, at least 0 and at most 2147483647, not -1"),
    ("verify_tree", {"top_k": 2**31}, ValueError, "top_k must be finite, at least 0 and at most 2147483647, not 2147483648"),
    ("verify_tree", {"top_k": 2.5}, TypeError, "top_k must hold integers, not 2.5"),
    ("verify_tree", {"posterior_threshold": -1.0}, ValueError, "posterior_threshold must be finite, at least 0, not -1.0"),
    ("verify_tree", {"posterior_alpha": -1.0}, ValueError, "posterior_alpha must be finite, at least 0, not -1.0"),
    ("verify_tree", {"seed": 0.5}, TypeError, "seed must be an int, not float"),
    ("verify_tree", {"seed": [1, 2, 3]}, ValueError, "seed must be one value or one per sequence (2), not shape (3,)"),
    ("verify_tree", {"seed": [1, 2.5]}, TypeError, "seed[1] must be an int, not float"),
    ("verify_tree", {"top_k": 2**70}, ValueError, "top_k must fit 64 bits, not 1180591620717411303424"),
    ("verify_tree", {"seed": 2**63}, ValueError, "seed must be between -9223372036854775808 and 9223372036854775807, not"),
    ("verify_tree", {"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, "seed must have shape (2,), not (3,)"),
    ("verify_tree", {"offset": torch.tensor([3, -1])}, ValueError, "offset must be finite, at least 0, not -1"),
    ("verify_tree", {"max_depth": 1}, ValueError, "max_depth must be at least the tree's depth 2, not 1"),
    # on the CPU, parents are looked at wherever the logits are
    ("verify_tree", {"logits": Z(BATCH, N, VOCAB, device="meta"), "tree_tokens": Z(BATCH, N, dtype=torch.int32, device="meta"), "max_depth": 1}, ValueError, "max_depth must be at least the tree's depth 2, not 1"),
    ("verify_tree", {"max_depth": 256}, ValueError, "max_depth must be between 0 and 255, not 256"),
    ("verify_tree", {"max_depth": 2.0}, TypeError, "max_depth must be an int, not float"),
    ("verify_tree", {"max_depth": np.array([1, 2])}, TypeError, "max_depth must be an int, not ndarray"),
    ("verify_tree", {"temperature": True}, TypeError, "temperature must hold numbers, not True"),
    ("verify_tree", {"top_p": torch.tensor([1e-46, 1.0], dtype=torch.float64)}, ValueError, "top_p must be finite, above 0"),
    ("verify_tree", {"temperature": 1e300}, ValueError, "temperature must be finite, at least 0, not inf"),
    ("verify_tree", {"parents": TREE.parents.to("meta")}, ValueError, "parents must be on cpu, not on meta"),
    # verify_lm_head: what it shares with verify_tree is checked by the same code
    ("verify_lm_head", {"hidden": Z(N, HIDDEN)}, ValueError, "hidden must have shape (any, any, any), not (7, 16)"),
    ("verify_lm_head", {"hidden": Z(0, N, HIDDEN)}, ValueError, "hidden's batch must be between 1 and"),
    ("verify_lm_head", {"hidden": Z(BATCH, 257, HIDDEN)}, ValueError, "hidden's number of nodes must be between 1 and 256, not 257"),
    ("verify_lm_head", {"hidden": Z(BATCH, N, 0), "lm_head_weight": Z(VOCAB, 0)}, ValueError, "hidden's hidden_size must be between 1"),
    ("verify_lm_head", {"hidden": Z(BATCH, N, HIDDEN, dtype=torch.float64)}, TypeError, "hidden must have dtype float32 or bfloat16 or float16, not float64"),
    ("verify_lm_head", {"lm_head_weight": None}, TypeError, "lm_head_weight must be a torch.Tensor, not NoneType"),
    ("verify_lm_head", {"lm_head_weight": Z(VOCAB, HIDDEN + 1)}, ValueError, "lm_head_weight must have shape (any, 16), not (11, 17)"),
    ("verify_lm_head", {"lm_head_weight": Z(0, HIDDEN)}, ValueError, "lm_head_weight's vocabulary must be between 1 and"),
    ("verify_lm_head", {"lm_head_weight": Z(HIDDEN, VOCAB).T}, ValueError, "lm_head_weight must be contiguous in its last 2"),
    ("verify_lm_head", {"top_p": 0.9}, ValueError, "top_p must be 1.0, off: truncation needs all logits, so use linear and verify_tree"),
    ("verify_lm_head", {"top_p": torch.ones(BATCH)}, ValueError, "top_p must be 1.0, off"),
    ("verify_lm_head", {"top_k": [0, 3]}, ValueError, "top_k must be 0, off: truncation needs all logits, so use linear and verify_tree"),
    ("verify_lm_head", {"tree_tokens": torch.full((BATCH, N), VOCAB, dtype=torch.int32)}, ValueError, "tree_tokens must hold values between 0 and 10; it holds 11"),
    ("verify_lm_head", {"parents": i32(0, 0, 0, 0, 1, 2, 3)}, ValueError, "parents must be -1 at node 0, the root"),
    ("verify_lm_head", {"mode": "nucleus"}, ValueError, "mode must be one of 'greedy', 'typical', 'lossless', not 'nucleus'"),
    ("verify_lm_head", {"max_depth": 1}, ValueError, "max_depth must be at least the tree's depth 2, not 1"),
    ("verify_lm_head", {"backend": "triton"}, ValueError, "backend 'triton' is not available for verify_lm_head: it has 'reference', 'cpu', 'cuda'"),
    # compact_kv
    ("compact_kv", {"kv_cache": CACHE}, ValueError, "kv_cache must have shape (any, 2, any, any, any, any), not (2, 20, 2, 8)"),
    ("compact_kv", {"kv_cache": Z(3, 2, BATCH, SEQ, DIM, KV).transpose(4, 5)}, ValueError, "kv_cache must be contiguous in its last 2"),
    ("compact_kv", {"kv_cache": Z(3, 2, 1, SEQ, KV, DIM).expand(-1, -1, BATCH, -1, -1, -1)}, ValueError, "kv_cache is written, so its elements must not share memory"),
    ("compact_kv", {"accepted_nodes": i32([0, 2, 1], [0, -1, -1])}, ValueError, "accepted_nodes must hold rising node ids up to accept_length in every row; row 0 holds [0, 2, 1]"),
    ("compact_kv", {"accepted_nodes": i32([0, 2, -1], [0, -1, -1])}, ValueError, "accepted_nodes must hold rising node ids up to accept_length in every row"),
    ("compact_kv", {"accepted_nodes": i32([0, 2, 500], [0, -1, -1])}, ValueError, "accepted_nodes must hold values between -1 and 255; it holds 500"),
    ("compact_kv", {"accepted_nodes": i32([0, 2, 20], [0, -1, -1])}, ValueError, "accepted_nodes must stay inside the cache: cache_seqlens + node is 20, max_seqlen 20"),
    ("compact_kv", {"accept_length": i32(3, 0)}, ValueError, "accept_length must hold values between 0 and 2; it holds 3"),
    ("compact_kv", {"cache_seqlens": i32(0, 20)}, ValueError, "cache_seqlens must hold values between 0 and 19; it holds 20"),
    # rms_norm, silu_mul
    ("rms_norm", {"x": Z(8)}, ValueError, "x must have shape (any, any), not (8,)"),
    ("rms_norm", {"weight": Z(9)}, ValueError, "weight must have shape (8,), not (9,)"),
    ("rms_norm", {"eps": 0.0}, ValueError, "eps must be above 0 in fp32, not 0.0"),
    ("rms_norm", {"eps": 1e-300}, ValueError, "eps must be above 0 in fp32, not 1e-300"),
    ("rms_norm", {"eps": "1e-5"}, TypeError, "eps must be a number, not str"),
    ("rms_norm", {"residual": Z(3, 8).half()}, TypeError, "residual must have dtype float32, not float16"),
    ("rms_norm", {"residual": Z(8, 3).T}, ValueError, "residual must be contiguous in its last 1 dimension(s)"),
    ("rms_norm", {"residual": Z(1, 8).expand(3, 8)}, ValueError, "residual is written, so its elements must not share memory"),
    ("rms_norm", {"backend": "triton"}, ValueError, "backend 'triton' is not available for rms_norm: it has 'reference', 'cpu', 'cuda'"),
    ("silu_mul", {"gate_up": Z(3, 7)}, ValueError, "gate_up must have an even number of columns, not 7"),
    ("silu_mul", {"gate_up": Z(0, 8)}, ValueError, "gate_up's number of rows must be between 1"),
    ("silu_mul", {"gate_up": Z(3, 8, dtype=torch.int32)}, TypeError, "gate_up must have dtype float32 or bfloat16 or float16, not int32"),
    ("silu_mul", {"gate_up": Z(3, 8, device="meta")}, ValueError, "silu_mul takes tensors on a cpu or cuda device, not on meta"),
    # rotary_append
    ("rotary_append", {"k": Z(BATCH, N + 1, KV, DIM)}, ValueError, "k must have shape (2, 7, any, 8), not (2, 8, 2, 8)"),
    ("rotary_append", {"v": Z(BATCH, N, KV, DIM).half()}, TypeError, "v must have dtype float32, not float16"),
    ("rotary_append", {"q": Z(BATCH, N, DIM, HEADS).transpose(2, 3)}, ValueError, "q must be contiguous in its last 1 dimension(s)"),
    ("rotary_append", {"q": Z(1, N, HEADS, DIM).expand(BATCH, -1, -1, -1)}, ValueError, "q is written, so its elements must not share memory"),
    ("rotary_append", {"cos": Z(SEQ, DIM), "sin": Z(SEQ, DIM)}, ValueError, "cos' width (rotary_dim / 2) must be between 1 and 4, not 8"),
    ("rotary_append", {"cos": Z(SEQ, 4).half()}, TypeError, "cos must have dtype float32, not float16"),
    ("rotary_append", {"sin": Z(SEQ, 3)}, ValueError, "sin must have shape (20, 4), not (20, 3)"),
    ("rotary_append", {"cos": Z(6, 4), "sin": Z(6, 4)}, ValueError, "the last position (cache_seqlens + depths) must be between 0 and 5, not 7"),
    ("rotary_append", {"k_cache": CACHE, "v_cache": CACHE}, ValueError, "v_cache must have memory of its own, not k_cache's"),
    ("rotary_append", {"cache_seqlens": i32(0, 14)}, ValueError, "cache_seqlens must hold values between 0 and 13; it holds 14"),
    ("rotary_append", {"depths": TREE.depths[:3]}, ValueError, "depths must have shape (7,) or (2, 7), not (3,)"),
    ("rotary_append", {"depths": -TREE.depths}, ValueError, "depths must hold values between 0 and 6; it holds -2"),
    ("rotary_append", {"q_norm": Z(DIM)}, ValueError, "q_norm and k_norm must be given together, in one dtype, not torch.float32 and None"),
    ("rotary_append", {"q_norm": Z(9), "k_norm": Z(9)}, ValueError, "q_norm must have shape (8,), not (9,)"),
    ("rotary_append", {"norm_eps": torch.nan}, ValueError, "norm_eps must be finite in fp32, not nan"),
    ("rotary_append", {"norm_eps": -1.0}, ValueError, "norm_eps must be above 0 in fp32, not -1.0"),
    # linear, pack_linear
    ("linear", {"x": Z(3, 2, 8)}, ValueError, "x must have shape (any, any), not (3, 2, 8)"),
    ("linear", {"x": Z(3, 0), "weight": Z(5, 0)}, ValueError, "x's in_features must be between 1"),
    ("linear", {"weight": Z(8, 5)}, ValueError, "weight must have shape (any, 8), not (8, 5)"),
    ("linear", {"weight": Z(0, 8)}, ValueError, "weight's out_features must be between 1"),
    ("linear", {"weight": [1]}, TypeError, "weight must be a torch.Tensor, not list"),
    ("linear", {"bias": Z(6)}, ValueError, "bias must have shape (5,), not (6,)"),
    ("linear", {"residual": Z(3, 6)}, ValueError, "residual must have shape (3, 5), not (3, 6)"),
    ("linear", {"backend": "triton"}, ValueError, "backend 'triton' is not available for linear: it has"),
    ("pack_linear", {"weight": [1]}, TypeError, "weight must be a torch.Tensor, not list"),
    ("pack_linear", {"weight": Z(8)}, ValueError, "weight must have shape (..., out_features, in_features), not (8,)"),
    ("pack_linear", {"dtype": "int4"}, ValueError, "dtype must be one of 'float32', 'bfloat16', 'float16', 'int8', not 'int4'"),
]  # fmt: skip


@pytest.mark.parametrize("op", ["tree_attention", "draft_heads", "verify_tree", "verify_lm_head", "compact_kv", "rms_norm",
                                "rotary_append", "silu_mul", "linear", "pack_linear"])  # fmt: skip
def test_the_good_calls_work(op):
    getattr(mk, op)(**good(op))


@pytest.mark.parametrize(
    ("op", "change", "error", "words"), ROWS, ids=[f"{op}-{'+'.join(c)}-{i}" for i, (op, c, *_) in enumerate(ROWS)]
)
def test_malformed_call(op, change, error, words):
    with pytest.raises(error) as caught:
        getattr(mk, op)(**good(op) | change)
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refused_call_changes_nothing():
    arguments = good("rotary_append") | {"depths": TREE.depths + 100}
    before = {name: value.clone() for name, value in arguments.items()}
    with pytest.raises(ValueError, match="depths"):
        mk.rotary_append(**arguments)
    assert all(torch.equal(value, before[name]) for name, value in arguments.items())


def test_cuda_on_the_cpu_says_why():
    with pytest.raises(
        ValueError,
        match=r"backend 'cuda' (is not available for silu_mul: .+|takes tensors on a cuda device, not on cpu)",
    ):
        mk.silu_mul(torch.zeros(1, 2), backend="cuda")


def test_packed_weights_belong_to_the_cpu():
    packed = mk.pack_linear(torch.zeros(5, 8))
    with pytest.raises(ValueError, match=r"a packed weight runs on backend 'cpu', not 'reference'"):
        mk.linear(torch.zeros(3, 8), packed, backend="reference")
    with pytest.raises(ValueError, match=r"weight must have shape \(any, 9\), not \(5, 8\) \(packed\)"):
        mk.linear(torch.zeros(3, 9), packed)
    with pytest.raises(ValueError, match=r"a packed weight runs on backend 'cpu', not 'reference'"):
        mk.draft_heads(torch.zeros(1, 8), torch.zeros(1, 1, 8, 8), None, packed, 1, backend="reference")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_results_are_no_part_of_a_gradient(backend):
    weight = torch.nn.Parameter(torch.ones(3, 4))
    assert not mk.linear(torch.ones(2, 4), weight, backend=backend).requires_grad
    residual = torch.nn.Parameter(torch.ones(2, 4))
    mk.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5, residual=residual, backend=backend)
    assert torch.equal(residual.detach(), torch.full((2, 4), 2.0))
