"""Where the guesses come from: Medusa heads on the last accepted node's hidden row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from medusa_kernels.launches import bind

from .heads import MedusaHeads
from .model import Model


class MedusaDrafter:
    """The heads' weights as the model's kernels read them."""

    def __init__(self, model: Model, heads: MedusaHeads):
        self.num_heads = heads.num_heads
        self.accuracy, self.paths = heads.accuracy, heads.metadata.get("paths")
        self._model = model
        self._token_map = None if heads.token_map is None else heads.token_map.to(model.device)
        lm_head = heads.lm_head_weight
        if lm_head is None:
            lm_head = model.lm_head_source
            if heads.token_map is not None:
                lm_head = lm_head[heads.token_map.long()]
        shares_all = heads.lm_head_weight is None and heads.token_map is None
        self._lm_head = model.lm_head if shares_all else model.pack(lm_head)
        self._block_weight = model.pack(heads.block_weight)
        self._block_bias = None if heads.block_bias is None else heads.block_bias.to(model.device, model.dtype)
        self.vocab_size = lm_head.shape[-2]

    def bind(self, hidden: Tensor, top_k: int) -> tuple[Tensor, Tensor, Callable[[], None]]:
        """draft_tokens int32 and logprobs fp32 (batch, heads, top_k), and the call that fills both from hidden.

        hidden is (batch, hidden_size). The caller keeps all three tensors: the call knows their addresses alone.
        """
        shape = (hidden.shape[0], self.num_heads, top_k)
        draft_tokens = torch.empty(shape, dtype=torch.int32, device=hidden.device)
        logprobs = torch.empty(shape, dtype=torch.float32, device=hidden.device)
        weights = (self._block_weight, self._block_bias, self._lm_head, self._token_map)
        call = bind(self._model.launch["draft_heads"], hidden, *weights, top_k, draft_tokens, logprobs)
        return draft_tokens, logprobs, call
