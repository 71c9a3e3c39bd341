"""Where the guesses come from: Medusa heads on the last accepted node's hidden row, told the root if they want it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from medusa_kernels.launches import bind

from .heads import ROOT_EPS, MedusaHeads
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
        self._root_weight = None if heads.root_weight is None else model.pack(heads.root_weight)
        self.vocab_size = lm_head.shape[-2]

    def bind(self, hidden: Tensor, root: Tensor, top_k: int) -> tuple[Tensor, Tensor, Callable[[], None]]:
        """draft_tokens int32 and logprobs fp32 (batch, heads, top_k), and the call that fills both.

        The call reads hidden (batch, hidden_size) and root int32 (batch,), the token that was chosen from it; the
        caller keeps all four tensors: the call knows their addresses alone.
        """
        shape = (hidden.shape[0], self.num_heads, top_k)
        draft_tokens = torch.empty(shape, dtype=torch.int32, device=hidden.device)
        logprobs = torch.empty(shape, dtype=torch.float32, device=hidden.device)
        weights = (self._block_weight, self._block_bias, self._lm_head, self._token_map)
        launch = self._model.launch["draft_heads"]
        if self._root_weight is None:
            return draft_tokens, logprobs, bind(launch, hidden, *weights, top_k, draft_tokens, logprobs)
        told, tell = self._bind_root(hidden, root)
        heads = bind(launch, told, *weights, top_k, draft_tokens, logprobs)

        def call() -> None:
            tell()
            heads()

        return draft_tokens, logprobs, call

    def _bind_root(self, hidden: Tensor, root: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """What the heads read once they are told the root, and the call that computes it."""
        model, told = self._model, torch.empty_like(hidden)
        embedded, normed = torch.empty_like(hidden), torch.empty_like(hidden)
        scale = torch.ones(hidden.shape[1], device=hidden.device)
        norm = bind(model.launch["rms_norm"], embedded, scale, ROOT_EPS, None, normed)
        add = bind(model.launch["linear"], normed, self._root_weight, None, hidden, told)

        def call() -> None:
            embedded.copy_(F.embedding(root, model.embedding))
            norm()
            add()

        return told, call
