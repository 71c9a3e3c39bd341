"""Guesses of a smaller model: classic speculative decoding. The smaller model may be the target's own first layers."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import torch

from .draft import ChainDrafter
from .kv_cache import KVCache
from .model import Forward, Model
from .prefill import chain_layout, prefill

if TYPE_CHECKING:
    from .decode import Decoder


class ModelDrafter(ChainDrafter):
    """A model that decodes greedily ahead of the target, one token after another.

    Its best guess alone makes it deterministic, see draft.py. Past its own context its guesses get worse; the text
    stays the target's.
    """

    auto_nodes = 5

    def __init__(self, model: Model, *, first_layers: bool = False):
        """`first_layers`: the model is `first_layers_of` the target's, so its K/V rows are the target's own."""
        self.model, self.first_layers = model, first_layers

    def join(self, decoder: Decoder) -> ModelDraft:
        return ModelDraft(self, decoder)


def first_layers_of(model: Model, count: int) -> Model:
    """The model's first layers under its own final norm and LM head: the very same weights, none copied."""
    draft = copy.copy(model)
    draft.config = dataclasses.replace(model.config, num_layers=count)
    draft.layers = model.layers[:count]
    return draft


class ModelDraft:
    """The draft model's cache beside the target's, in step with it.

    Before a step the target's cache holds the committed rows and the draft's holds the same ones, but for the last:
    where the target accepted every guess, the draft has never been fed the last of them. So a step begins with that
    token and the root, whether the row is missing or not: two rows cost what one does, and no sequence of a ragged
    batch differs from the others. Rows of rejected guesses lie past the length and are written over.

    First layers of the target read and write the target's own rows, where none is ever missing.
    """

    capturable = True

    def __init__(self, drafter: ModelDrafter, decoder: Decoder):
        self._model = drafter.model
        # And not the decoder, whose cache would then outlive it.
        self._tree_tokens, self._accept_length = decoder.tree_tokens, decoder.accept_length
        self._committed = decoder.cache.seqlens
        model, batch, device = drafter.model, decoder.batch, drafter.model.device
        self._behind = 0 if drafter.first_layers else 1
        if drafter.first_layers:
            rows = decoder.cache.data[: model.config.num_layers]
            self._cache = KVCache(rows, torch.zeros_like(decoder.cache.seqlens))
        else:
            self._cache = model.new_cache(batch, decoder.cache.rows)
        self._first, self._next = (
            Forward(model, self._cache, n, *chain_layout(n, device)) for n in (1 + self._behind, 1)
        )
        self._row = torch.empty(batch, model.config.hidden_size, dtype=model.activation_dtype, device=device)
        self._logits, self._head = model.head(self._row)
        # Of one tokenizer, two models may still pad their vocabularies differently.
        self._shared_vocab = min(model.config.vocab_size, decoder.model.config.vocab_size)
        self._last_token = torch.zeros(batch, dtype=torch.int32, device=device)

    def start(self, prompts: list[list[int]]) -> None:
        if not self._behind:
            return
        for b, prompt in enumerate(prompts):
            known = [min(token, self._shared_vocab - 1) for token in prompt]
            prefill(self._model, self._cache.sequence(b), known)
            self._last_token[b] = known[-1]

    def propose(self) -> None:
        tokens, seqlens, forward = self._tree_tokens, self._cache.seqlens, self._first
        seqlens.copy_(self._committed - self._behind).clamp_(min=0)  # a retired sequence has no row behind
        forward.tokens[:, 0] = self._last_token
        forward.tokens[:, -1] = tokens[:, 0].clamp(max=self._shared_vocab - 1)
        for depth in range(1, tokens.shape[1]):
            forward.run()
            self._row.copy_(forward.hidden.view(len(tokens), -1, self._row.shape[1])[:, -1])
            self._head()
            guess = self._logits[:, : self._shared_vocab].argmax(dim=1)
            tokens[:, depth] = guess
            seqlens.add_(forward.tokens.shape[1])
            forward = self._next
            forward.tokens[:, 0] = guess

    def advance(self) -> None:
        if self._behind:
            accepted = self._accept_length.long()[:, None]  # on a chain, the last accepted node
            last = self._tree_tokens.gather(1, accepted)[:, 0]
            self._last_token.copy_(last.clamp(max=self._shared_vocab - 1))
