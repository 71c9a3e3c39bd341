"""A rival for plain decoding: the same weights in PyTorch, torch.compile'd over a static cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medusa_engine.model import Layer, Model


class CompiledDecoder:
    """Greedy decoding of `batch` sequences that stand at one and the same position.

    Attributes:
        tokens: int64 (batch, 1), the last token; `step` replaces it.
        position: int64 (1,), where it goes; `step` advances it.
    """

    def __init__(self, model: Model, *, batch: int, rows: int, compiled: bool = True):
        c, device = model.config, model.device
        self.model = model
        shape = (batch, c.num_kv_heads, rows, c.head_dim)
        # Tensors of their own: the compiler would suspect parts of one to overlap.
        self.caches = [
            tuple(torch.zeros(shape, dtype=model.dtype, device=device) for _ in "kv") for _ in range(c.num_layers)
        ]
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self._rows = torch.arange(rows, device=device)
        compile_ = torch.compile(dynamic=False, fullgraph=True) if compiled else lambda f: f
        # One layer compiled once serves all: they differ in their tensors alone.
        self._layer, self._ends = compile_(self._layer_forward), compile_(self._logits)

    def step(self) -> Tensor:
        """The logits (batch, vocab) after `tokens`; their argmax is the next."""
        cos, sin = (t[self.position].to(self.model.dtype) for t in self.model.rope())
        visible = (self._rows <= self.position)[None, None, None]
        x = F.embedding(self.tokens, self.model.embedding)
        for layer, (k, v) in zip(self.model.layers, self.caches, strict=True):
            x = self._layer(x, layer_tensors(layer), k, v, self.position, cos, sin, visible)
        logits = self._ends(x)
        self.tokens.copy_(logits.argmax(-1, keepdim=True))
        self.position.add_(1)
        return logits

    def _layer_forward(self, x, weights, k_cache, v_cache, position, cos, sin, visible) -> Tensor:
        c = self.model.config
        input_norm, qkv, o, post_norm, gate_up, down = weights
        batch = x.shape[0]
        y = F.linear(_rms_norm(x, input_norm, c.rms_norm_eps), qkv).view(batch, 1, -1, c.head_dim).transpose(1, 2)
        q, k, v = y.split([c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        k_cache.index_copy_(2, position, _rotate(k, cos, sin))
        v_cache.index_copy_(2, position, v)
        # A K/V head's queries are rows of one product: K/V are read once.
        grouped = _rotate(q, cos, sin).reshape(batch, c.num_kv_heads, -1, c.head_dim)
        attended = F.scaled_dot_product_attention(grouped, k_cache, v_cache, attn_mask=visible)
        x = x + F.linear(attended.reshape(batch, 1, -1), o)
        gate, up = F.linear(_rms_norm(x, post_norm, c.rms_norm_eps), gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, down)

    def _logits(self, x: Tensor) -> Tensor:
        normed = _rms_norm(x[:, 0], self.model.norm, self.model.config.rms_norm_eps)
        return F.linear(normed, self.model.lm_head).float()


def layer_tensors(layer: Layer) -> tuple[Tensor, ...]:
    """Llama's: no biases, no norms of queries and keys."""
    return layer.input_norm, layer.qkv, layer.o, layer.post_norm, layer.gate_up, layer.down


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
