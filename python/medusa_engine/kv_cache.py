"""The K/V cache of a batch: one tensor for all layers, so that one compact_kv moves them all."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of `batch` sequences, `rows` rows each.

    Attributes:
        data: (layers, 2, batch, rows, kv_heads, head_dim); rows are written before they are read, so it starts
        unwritten. seqlens: int32 (batch,), committed rows. Its storage never changes: launches are bound to it.
    """

    def __init__(self, data: Tensor, seqlens: Tensor):
        self.data, self.seqlens = data, seqlens

    @classmethod
    def allocate(
        cls,
        *,
        layers: int,
        batch: int,
        rows: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        data = torch.empty(layers, 2, batch, rows, kv_heads, head_dim, dtype=dtype, device=device)
        return cls(data, torch.zeros(batch, dtype=torch.int32, device=device))

    @property
    def batch(self) -> int:
        return self.data.shape[2]

    @property
    def rows(self) -> int:
        return self.data.shape[3]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """k_cache and v_cache of one layer, each (batch, rows, kv_heads, head_dim)."""
        return self.data[index, 0], self.data[index, 1]

    def sequence(self, index: int) -> KVCache:
        """The cache of one sequence alone: a view on the same rows and the same length."""
        return KVCache(self.data[:, :, index : index + 1], self.seqlens[index : index + 1])
