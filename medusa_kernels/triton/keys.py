"""Integers that order like the numbers they stand for, so that equal logits are settled by token id."""

import triton
import triton.language as tl


@triton.jit
def order_key(x):
    """int32 in the order of the fp32 x; -0 and 0 share one. No number's key is -2**31."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def rank_key(x, token):
    """int64: the larger x first, of equal ones the lower token."""
    return (order_key(x).to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def rank_value(key):
    return key_value((key >> 32).to(tl.int32))


@triton.jit
def rank_token(key):
    return (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32)
