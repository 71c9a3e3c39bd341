"""Where the guesses come from: what the loop asks of any source, and the Medusa heads, its first one.

Every source here is deterministic: its guesses are a fixed function of the text so far. That is all `verify_tree` needs
to be lossless, whatever the guesses are worth. Speculative sampling (Leviathan et al., 2023) accepts a guess x that was
drawn from q with probability min(1, p(x) / q(x)) and else draws from the normalised (p - q)+. Where q is certain of its
one guess d, that is: d with probability p(d), else a token from p without d. Drawing a token from p and keeping the
guess where it matches is the same rule: the token is d with probability p(d), and else has p's distribution without d.
With a seed the token drawn at a position is plain sampling's own, so the text is too, token for token. A source that
samples would be right more often where p is flat, by the sum of min(p, q), and lose that; `bench.speculation` measures
how much more often, and that sampling with the position's own number, which would keep it, gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from medusa_kernels.launches import bind
from medusa_kernels.tree import MAX_NODES

from .dynamic_tree import DynamicTree, Growth
from .heads import ROOT_EPS, MedusaHeads
from .model import Model

if TYPE_CHECKING:
    from .decode import Decoder


class Draft(Protocol):
    """A source's state for one decoder: it fills the tree.

    Attributes:
        capturable: its `propose` and `advance` read nothing on the host, so that a captured step may hold them.
    """

    capturable: bool

    def start(self, prompts: list[list[int]]) -> None:
        """The decoder's cache holds these prompts, and `next_token` the first token of each."""

    def propose(self) -> None:
        """Writes the guesses to columns 1 and up of the decoder's `tree_tokens`; column 0 holds the root."""

    def advance(self) -> None:
        """The step's acceptance is known; the cache's lengths are still those before it."""


class Drafter(Protocol):
    """A source of guesses.

    Attributes:
        num_heads, vocab_size: the deepest node it can fill, and the guesses it has for each depth.
        paths, accuracy: as `MedusaHeads` has them: what a tree given as a number of nodes is made of.
        auto_nodes: the most nodes tree="auto" may give it.
    """

    num_heads: int
    vocab_size: int
    paths: list[list[int]] | None
    accuracy: list[list[float]] | None
    auto_nodes: int

    def join(self, decoder: Decoder) -> Draft: ...


class ChainDrafter:
    """A source with one guess for each depth: of any tree it fills the chain of best guesses."""

    num_heads = MAX_NODES - 1
    vocab_size = 1
    accuracy = None
    paths = [[0] * depth for depth in range(1, MAX_NODES)]  # noqa: RUF012


class MedusaDrafter:
    """The heads' weights as the model's kernels read them."""

    auto_nodes = MAX_NODES

    def __init__(self, model: Model, heads: MedusaHeads):
        self.num_heads = heads.num_heads
        self.accuracy, self.paths = heads.accuracy, heads.metadata.get("paths")
        self.temperatures: list[float] | None = heads.metadata.get("temperatures")
        self._model = model
        self._token_map = None if heads.token_map is None else heads.token_map.to(model.device)
        lm_head = heads.lm_head_weight
        if lm_head is None and heads.token_map is None:
            self._lm_head, self.vocab_size = model.lm_head, model.config.vocab_size
        else:
            rows = model.lm_head_source[heads.token_map.long()] if lm_head is None else lm_head
            self._lm_head, self.vocab_size = model.pack(rows), rows.shape[-2]
        self._block_weight = model.pack(heads.block_weight)
        self._block_bias = None if heads.block_bias is None else heads.block_bias.to(model.device, model.dtype)
        self._root_weight = None if heads.root_weight is None else model.pack(heads.root_weight)

    def join(self, decoder: Decoder) -> MedusaDraft:
        return (DynamicDraft if isinstance(decoder.tree, DynamicTree) else MedusaDraft)(self, decoder)

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
        scale = torch.ones(hidden.shape[1], dtype=torch.float32, device=hidden.device)
        norm = bind(model.launch["rms_norm"], embedded, scale, ROOT_EPS, None, normed)
        add = bind(model.launch["linear"], normed, self._root_weight, None, hidden, told)

        def call() -> None:
            embedded.copy_(F.embedding(root, model.embedding))
            norm()
            add()

        return told, call


class MedusaDraft:
    """The heads run on the hidden row of each sequence's last accepted node.

    Attributes:
        draft_tokens, logprobs: int32 and fp32 (batch, heads, top_k), as the heads gave them for the last step.
    """

    capturable = True

    def __init__(self, drafter: MedusaDrafter, decoder: Decoder):
        tree = decoder.tree
        self._tree_tokens = decoder.tree_tokens
        self.draft_tokens, self.logprobs, self._run = drafter.bind(decoder.root_hidden, decoder.next_token, tree.top_k)
        self._flat = self.draft_tokens.view(decoder.batch, -1)
        self._fill = self._filler(decoder)

    def _filler(self, decoder: Decoder) -> Callable[[], None]:
        """The call that puts draft tokens at the tree's nodes."""
        tree = decoder.tree
        # Where each node's token lies among one sequence's draft tokens.
        slots = ((tree.depths[1:] - 1) * tree.top_k + tree.ranks[1:]).to(decoder.tree_tokens.device)

        def fill() -> None:
            self._tree_tokens[:, 1:] = self._flat.index_select(1, slots)

        return fill

    def start(self, prompts: list[list[int]]) -> None:
        """The prefill has left the hidden rows: that is all the heads read."""

    def propose(self) -> None:
        self._run()
        self._fill()

    def advance(self) -> None:
        """The decoder keeps the accepted hidden rows itself."""


class DynamicDraft(MedusaDraft):
    """The heads fill, for each sequence, the tree that they find most probable at this step.

    Attributes:
        growth: chooses the nodes, and writes the decoder's layout.
    """

    def _filler(self, decoder: Decoder) -> Callable[[], None]:
        self.growth = growth = Growth(decoder.tree, decoder.layout)

        def fill() -> None:
            growth(self.logprobs)
            self._tree_tokens[:, 1:] = self._flat.gather(1, growth.slots)

        return fill
