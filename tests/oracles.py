"""Independent definitions: dense masks, float64, brute force. They share no code with medusa_kernels/reference.

Float oracles take the dtype to compute in: float64 is exact, the inputs' own dtype is "plain PyTorch"
(tests/tolerances.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def ancestors(parents: Sequence[int]) -> Tensor:
    """bool (n, n): [i, j] iff j is i or above it."""
    visible = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            visible[node] |= visible[parent]
    return visible


def words(visible: Tensor) -> Tensor:
    """bool (n, n) -> int64 (n, words), bit j of word w is column 64 w + j."""
    n = visible.shape[-1]
    bits = np.zeros((n, -(-n // 64) * 64), dtype=np.uint8)
    bits[:, :n] = visible.numpy()
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view("<i8").astype(np.int64))


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    visible: Tensor,
    scale: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """`visible` is bool (batch, n, n)."""
    n = q.shape[1]
    rows = []
    for b, prefix in enumerate(lengths.tolist()):
        mask = torch.cat([torch.ones(n, prefix, dtype=torch.bool), visible[b]], dim=1)
        query, key, value = (
            t.to(dtype).transpose(0, 1) for t in (q[b], k_cache[b, : prefix + n], v_cache[b, : prefix + n])
        )
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
        rows.append(out.transpose(0, 1))
    return torch.stack(rows)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return out if residual is None else out + residual.to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), eps)


def silu_mul(gate_up: Tensor, dtype: torch.dtype) -> Tensor:
    half = gate_up.shape[-1] // 2
    return F.silu(gate_up[..., :half].to(dtype)) * gate_up[..., half:].to(dtype)


def rotate(x: Tensor, angles: Tensor, dtype: torch.dtype) -> Tensor:
    """x (n, heads, head_dim); angles float64 (n, half). Each pair (j, j + half) is a complex number turned by its
    angle."""
    half = angles.shape[1]
    x = x.to(dtype)
    cos, sin = angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, x[..., 2 * half :]], dim=-1)


def head_logprobs(
    hidden: Tensor, block_weight: Tensor, block_bias: Tensor | None, lm_head: Tensor, dtype: torch.dtype
) -> Tensor:
    """(batch, heads, vocab)."""
    heads, layers = block_weight.shape[:2]
    rows = []
    for head in range(heads):
        x = hidden.to(dtype)
        for layer in range(layers):
            bias = None if block_bias is None else block_bias[head, layer].to(dtype)
            x = x + F.silu(F.linear(x, block_weight[head, layer].to(dtype), bias))
        own = lm_head if lm_head.dim() == 2 else lm_head[head]
        rows.append(F.linear(x, own.to(dtype)).log_softmax(dim=-1))
    return torch.stack(rows, dim=1)


PHILOX_M = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
PHILOX_W = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)


def philox4x32_10(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """The generator of Salmon et al. (2011) from its round function: (L, R) pairs, multiply-high and multiply-low."""
    low, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    left, right = np.array(counter[::2], dtype=np.uint64), np.array(counter[1::2], dtype=np.uint64)
    keys = np.array(key, dtype=np.uint64)
    for _ in range(10):
        product = left * PHILOX_M
        high, rest = product >> low, product & mask
        left, right = high[::-1] ^ right ^ keys, rest[::-1]
        keys = (keys + PHILOX_W) & mask
    return [int(left[0]), int(right[0]), int(left[1]), int(right[1])]


def uniform(seed: int, counter: int) -> float:
    word = philox4x32_10([counter % 2**32, counter // 2**32 % 2**32, 0, 0], [seed % 2**32, seed // 2**32 % 2**32])[0]
    return (word >> 8) / 2**24


@dataclass
class Verdict:
    path: list[int]
    token: int
    margin: (
        float  # the smallest distance of a number to the one it was compared with: rounding below it changes nothing
    )

    @property
    def accept_length(self) -> int:
        return len(self.path) - 1


def verify(
    logits: Tensor,
    tokens: Sequence[int],
    parents: Sequence[int],
    mode: str,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    threshold: float = 0.09,
    alpha: float = 0.3,
    seed: int = 0,
    offset: int = 0,
) -> Verdict:
    """One sequence, by looking at every root-to-node path. logits (n, vocab)."""
    rows = logits.double().numpy()
    judge = _Judge(rows, temperature, top_p, top_k, threshold, alpha, seed, offset)
    if mode == "greedy" or temperature == 0:
        good = {node: tokens[node] == int(np.argmax(rows[parent])) for node, parent in enumerate(parents) if node}
        best = max(_accepted_paths(parents, good), key=lambda path: (len(path), -path[-1]))
        return Verdict(best, int(np.argmax(rows[best[-1]])), np.inf)
    if mode == "typical":
        good = {node: judge.typical(parent, tokens[node]) for node, parent in enumerate(parents) if node}
        paths = _accepted_paths(parents, good)
        total = {tuple(path): sum(judge.logp(parents[node])[tokens[node]] for node in path[1:]) for path in paths}
        depth = max(map(len, paths))
        longest = [path for path in paths if len(path) == depth]
        sums = sorted({total[tuple(path)] for path in longest})
        judge.note(min(np.diff(sums[-2:]), default=np.inf) if len(sums) > 1 else np.inf)
        best = max(longest, key=lambda path: (total[tuple(path)], -path[-1]))
        return Verdict(best, judge.draw(best[-1], len(best)), judge.margin)
    # lossless: the token each node would draw does not depend on the walk, so every node is judged before walking
    path = [0]
    while True:
        token = judge.draw(path[-1], len(path))
        nodes = [node for node, parent in enumerate(parents) if parent == path[-1] and tokens[node] == token]
        if not nodes:
            return Verdict(path, token, judge.margin)
        path.append(min(nodes))


class _Judge:
    """The comparisons of one sequence, and how close the closest of them was."""

    def __init__(self, rows, temperature, top_p, top_k, threshold, alpha, seed, offset):
        self.rows, self.temperature, self.top_p, self.top_k = rows, temperature, top_p, top_k
        self.threshold, self.alpha, self.seed, self.offset = threshold, alpha, seed, offset
        self.margin = np.inf

    def note(self, distance: float) -> None:
        self.margin = min(self.margin, float(distance))

    def logp(self, node: int) -> np.ndarray:
        x = self.rows[node] / self.temperature
        x = x - x.max()
        return x - np.log(np.exp(x).sum())

    def typical(self, node: int, token: int) -> bool:
        logp = self.logp(node)
        p = np.exp(logp)
        entropy = -sum(a * b for a, b in zip(p, logp, strict=True) if a > 0)
        limit = min(self.threshold, self.alpha * np.exp(-entropy))
        self.note(abs(p[token] - limit) if limit or p[token] else np.inf)
        return p[token] > limit

    def kept(self, node: int) -> np.ndarray:
        """P truncated and normalised again: top_k, then the smallest set with mass >= top_p."""
        p = np.exp(self.logp(node))
        order = sorted(range(len(p)), key=lambda token: (-self.rows[node][token], token))
        order = order[: self.top_k or None]
        kept = set(order)
        p = np.array([p[token] if token in kept else 0.0 for token in range(len(p))])
        p /= p.sum()
        if self.top_p < 1:
            mass = list(itertools.accumulate(p[token] for token in order))
            size = next((i for i, m in enumerate(mass) if m >= self.top_p), len(order) - 1) + 1
            self.note(min(abs(m - self.top_p) for m in mass))
            kept = set(order[:size])
            p = np.array([p[token] if token in kept else 0.0 for token in range(len(p))])
            p /= p.sum()
        return p

    def draw(self, node: int, distance: int) -> int:
        p, u = self.kept(node), uniform(self.seed, self.offset + distance)
        running = np.cumsum(p)
        inner = running[running < 1 - 1e-12]
        self.note(min(abs(inner - u), default=np.inf))
        alive = np.flatnonzero(p)
        return int(next((token for token in alive if running[token] > u), alive[-1]))


def _accepted_paths(parents: Sequence[int], good: dict[int, bool]) -> list[list[int]]:
    paths = [[0]]
    for node in range(1, len(parents)):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        if all(good[step] for step in path[1:]):
            paths.append(path)
    return paths
