"""verify_tree in two launches. One program per (sequence, node) settles what that node says: its token (argmax or draw;
a draw depends on the node's depth alone, so all nodes can draw at once), and which of its children are accepted. One
program per sequence then picks the path.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Call, Target, block, launcher
from .row_sampling import NO_TOKEN, argmax, draw, philox_uniform, shifted, truncated

_GREEDY: tl.constexpr = tl.constexpr(0)
_TYPICAL: tl.constexpr = tl.constexpr(1)


@triton.jit
def quotient(x, y):
    """Rounded to the nearest, as fp32's own division need not be."""
    return (x.to(tl.float64) / y.to(tl.float64)).to(tl.float32)


@triton.jit
def mass_and_floor(logits, vocab, top, temperature, threshold, alpha, BLOCK: tl.constexpr):
    """The softmax's denominator, and the probability above which typical acceptance (Medusa, section 2.3.1) takes a
    child.
    """
    masses = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocab, BLOCK):
        token = first + tl.arange(0, BLOCK)
        x = tl.load(logits + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        x = shifted(x, top, temperature)
        weight = tl.exp(x)
        masses += weight
        products += tl.where(weight > 0.0, weight * x, 0.0)
    mass = tl.sum(masses, 0)
    # exp(-H) as P is computed, without a logarithm: a P that equals the floor must not exceed it by rounding.
    likeness = quotient(tl.exp(tl.sum(products, 0) / mass), mass)
    return mass, tl.minimum(threshold, alpha * likeness)


@triton.jit
def judge_node_kernel(
    logits,  # (batch, n, vocab)
    tree_tokens,  # (batch, n)
    parents,  # (n,) or (batch, n)
    mode,  # (batch,), as the numbers that follow; None: every sequence is greedy
    temperature,
    top_p,
    top_k,
    posterior_threshold,
    posterior_alpha,
    seed,
    offset,
    said,  # int32 (batch, n): the token after each node
    edge,  # fp32 (batch, n): ln P of the node's token at its parent (0 where only the token counts); -inf: refused
    logits_batch_stride,
    logits_row_stride,
    parents_batch_stride,
    n,
    vocab,
    BLOCK: tl.constexpr,
    NODES: tl.constexpr,
):
    program = tl.program_id(0)
    b, node = program // n, program % n
    logits += b.to(tl.int64) * logits_batch_stride + node.to(tl.int64) * logits_row_stride
    parents += b * parents_batch_stride
    tree_tokens += b * n
    other = tl.arange(0, NODES)
    child = tl.load(parents + other, mask=other < n, other=-1) == node
    child_token = tl.load(tree_tokens + other, mask=child, other=-1)

    token, top = argmax(logits, vocab, BLOCK)
    child_edge = tl.where(child_token == token, 0.0, float("-inf"))
    if mode is not None:
        how, heat = tl.load(mode + b), tl.load(temperature + b)
        if (how != _GREEDY) & (heat > 0.0):  # temperature 0 is greedy in every mode
            depth = node * 0
            at = node
            while at > 0:
                at = tl.load(parents + at)
                depth += 1
            u = philox_uniform(tl.load(seed + b), tl.load(offset + b) + depth + 1)
            cut, ties = truncated(logits, vocab, tl.load(top_k + b), tl.load(top_p + b), top, heat, BLOCK)
            drawn = draw(logits, vocab, cut, ties, u, top, heat, BLOCK)
            token = tl.where(drawn < 0, token, drawn)
            if how == _TYPICAL:
                threshold, alpha = tl.load(posterior_threshold + b), tl.load(posterior_alpha + b)
                mass, floor = mass_and_floor(logits, vocab, top, heat, threshold, alpha, BLOCK)
                x = tl.load(logits + child_token, mask=child, other=float("-inf")).to(tl.float32)
                x = shifted(x, top, heat)
                p = quotient(tl.exp(x), mass)
                child_edge = tl.where(p > floor, x - tl.log(mass), float("-inf"))
            else:  # of siblings with the same token the first is meant
                match = tl.min(tl.where(child & (child_token == token), other, NO_TOKEN), 0)
                child_edge = tl.where(other == match, 0.0, float("-inf"))
    tl.store(said + program, token)
    tl.store(edge + b * n + other, child_edge, mask=child)


@triton.jit
def choose_path_kernel(
    parents,
    said,
    edge,
    accepted_nodes,  # (batch, max_depth + 1)
    accept_length,  # (batch,)
    next_token,  # (batch,)
    parents_batch_stride,
    n,
    max_depth,
    NODES: tl.constexpr,
    PATH: tl.constexpr,
):
    b = tl.program_id(0)
    parents += b * parents_batch_stride
    accepted_nodes += b * (max_depth + 1)
    node = tl.arange(0, NODES)
    at = tl.where(node < n, node, 0)
    depth = tl.zeros([NODES], tl.int32)
    total = tl.zeros([NODES], tl.float64)  # of few terms: exact enough that equal paths tie
    for _ in range(max_depth):
        below = at > 0
        total += tl.load(edge + b * n + at, mask=below, other=0.0).to(tl.float64)
        depth += below.to(tl.int32)
        at = tl.load(parents + at, mask=below, other=0)
    reached = (node < n) & (total > float("-inf"))
    deepest = tl.max(tl.where(reached, depth, -1), 0)
    reached = reached & (depth == deepest)
    likeliest = tl.max(tl.where(reached, total, float("-inf")), 0)
    last = tl.min(tl.where(reached & (total == likeliest), node, NO_TOKEN), 0)

    tl.store(accept_length + b, deepest)
    tl.store(next_token + b, tl.load(said + b * n + last))
    i = tl.arange(0, PATH)
    tl.store(accepted_nodes + i, tl.full([PATH], -1, tl.int32), mask=(i > deepest) & (i <= max_depth))
    while deepest >= 0:
        tl.store(accepted_nodes + deepest, last)
        last = tl.load(parents + last)
        deepest -= 1


def calls(
    target: Target,
    logits: Tensor,
    tree_tokens: Tensor,
    parents: Tensor,
    acceptance: tuple[Tensor, ...] | None,
    accepted_nodes: Tensor,
    accept_length: Tensor,
    next_token: Tensor,
) -> list[Call]:
    batch, n, vocab = logits.shape
    said = torch.empty(batch, n, dtype=torch.int32, device=logits.device)
    edge = torch.empty(batch, n, dtype=torch.float32, device=logits.device)
    parents_stride = parents.stride(0) if parents.dim() == 2 else 0
    nodes = block(n, 16, 256)
    judge = (logits, tree_tokens, parents, *(acceptance or [None] * 8), said, edge, *logits.stride()[:2])
    path = (parents, said, edge, accepted_nodes, accept_length, next_token, parents_stride, n)
    max_depth = accepted_nodes.shape[1] - 1
    return [
        Call(
            judge_node_kernel,
            batch * n,
            (*judge, parents_stride, n, vocab),
            {"BLOCK": block(vocab, 16, 2048), "NODES": nodes},
            warps=16,
        ),
        Call(
            choose_path_kernel,
            batch,
            (*path, max_depth),
            {"NODES": nodes, "PATH": block(max_depth + 1, 16, 256)},
        ),
    ]


launch = launcher(calls)
