"""The decoding step: propose, verify, accept, compact. Plain decoding is the same step on the root alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from medusa_kernels import Tree
from medusa_kernels.launches import bind
from medusa_kernels.verify_tree import Acceptance

from .draft import MedusaDrafter
from .model import Forward, Model

# Rows of one prefill pass: the same with and without Medusa, so that both start from the same cache.
PREFILL_CHUNK = 64


class Decoder:
    """The state of a batch between steps, with every launch bound to it.

    A step judges the tree whose root is the token that the base model chose last and emits accept_length + 1 tokens.

    Attributes:
        tree_tokens: int32 (batch, n), the tokens the step judges.
        accepted_nodes, accept_length, next_token: what `verify_tree` said of them.
        active: int32 (batch,), 0 once a sequence is retired: its cache then stands still.
    """

    def __init__(self, model: Model, drafter: MedusaDrafter | None, tree: Tree, *, batch: int, max_seqlen: int):
        self.model, self.tree = model, tree
        self.max_seqlen = max_seqlen
        # The step's own nodes stand behind the committed rows, also when those fill max_seqlen.
        self.cache = model.new_cache(batch, max_seqlen + tree.num_nodes)
        device, n = model.device, tree.num_nodes

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._forward = Forward(model, self.cache, n, tree.depths.to(device), tree.mask_words.to(device))
        self.tree_tokens = self._forward.tokens
        logits, self._head = model.head(self._forward.hidden)
        self.logits = logits.view(batch, n, -1)
        self._root_hidden = torch.empty(batch, model.config.hidden_size, dtype=logits.dtype, device=device)
        self.accepted_nodes, self.accept_length, self.next_token = (
            ints(batch, tree.max_depth + 1),
            ints(batch),
            ints(batch),
        )
        self._draft: Callable[[], None] | None = None
        if n > 1:
            draft_tokens, self._logprobs, self._draft = drafter.bind(self._root_hidden, self.next_token, tree.top_k)
            self._draft_tokens = draft_tokens.view(batch, -1)
            # Where each node's token lies among one sequence's draft tokens.
            self._draft_slots = ((tree.depths[1:] - 1) * tree.top_k + tree.ranks[1:]).to(device)
        self.active = ints(batch)
        self._parents = tree.parents.to(device)
        self._sequence = torch.arange(batch, device=device)
        self._compact = bind(
            model.launch["compact_kv"], self.cache.data, self.accepted_nodes, self.accept_length, self.cache.seqlens
        )
        self._acceptance: Acceptance | None = None

    @property
    def batch(self) -> int:
        return self.cache.batch

    def start(self, prompts: list[list[int]], acceptance: Acceptance | None) -> list[int]:
        """Prefills the cache, one sequence after another, and returns the first token of each, chosen as by a step."""
        self._acceptance = acceptance
        outputs = (self.accepted_nodes, self.accept_length, self.next_token)
        self._accept = self._bind_accept(self.logits, self.tree_tokens, self._parents, acceptance, *outputs)
        for b, prompt in enumerate(prompts):
            self._prefill(b, prompt)
        self.active.fill_(1)
        return self.next_token.tolist()

    def retire(self, b: int) -> None:
        """Sequence b has ended. It runs along until the others have too, on an empty cache: cheap, and never out of
        rows.
        """
        self.active[b] = 0
        self.cache.seqlens[b] = 0

    def step(self) -> list[list[int]]:
        """One verification of the whole batch: the tokens that each sequence gains, in order."""
        self.propose()
        self.verify()
        self.accept()
        emitted = self._emitted()
        self.compact()
        return emitted

    def propose(self) -> None:
        """The heads' guesses stand at the tree's nodes, the last chosen token at its root."""
        self.tree_tokens[:, 0] = self.next_token
        if self._draft is not None:
            self._draft()
            self.tree_tokens[:, 1:] = self._draft_tokens.index_select(1, self._draft_slots)

    def verify(self) -> None:
        """The base model's logits at every node, in one pass."""
        self._forward.run()
        self._head()

    def accept(self) -> None:
        """The path the base model agrees with, and the token it chooses after it."""
        if self._acceptance is not None:
            self._acceptance.offset.copy_(self.cache.seqlens)  # the root stands right behind the committed rows
        self._accept()

    def compact(self) -> None:
        """The accepted path's K/V rows and hidden row become the sequence's last."""
        self._compact()
        last = self.accepted_nodes.gather(1, self.accept_length.long()[:, None])[:, 0]
        self._root_hidden.copy_(
            self._forward.hidden.view(self.batch, self.tree.num_nodes, -1)[self._sequence, last.long()]
        )
        self.cache.seqlens.add_((self.accept_length + 1) * self.active)

    def _emitted(self) -> list[list[int]]:
        columns = (self.tree_tokens, self.accepted_nodes, self.accept_length, self.next_token)
        return [
            [*(tokens[node] for node in path[1 : length + 1]), bonus]
            for tokens, path, length, bonus in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def _prefill(self, b: int, prompt: list[int]) -> None:
        """Fills sequence b's rows in causal chunks and chooses the token after the prompt."""
        model, cache = self.model, self.cache.sequence(b)
        cache.seqlens.zero_()
        tokens = torch.tensor([prompt], dtype=torch.int32, device=model.device)
        forward = None
        for start in range(0, len(prompt), PREFILL_CHUNK):
            chunk = tokens[:, start : start + PREFILL_CHUNK]
            n = chunk.shape[1]
            if forward is None or forward.tokens.shape != chunk.shape:
                chain = Tree.named(f"chain-{n - 1}") if n > 1 else Tree.from_choices([])
                depths, mask = chain.depths.to(model.device), chain.mask_words.to(model.device)
                forward = Forward(model, cache, n, depths, mask, prompt_length=len(prompt))
            forward.tokens.copy_(chunk)
            forward.run()
            cache.seqlens.add_(n)
        hidden = forward.hidden[-1:]
        self._root_hidden[b] = hidden[0]
        logits, head = model.head(hidden)
        head()
        acceptance = self._acceptance
        if acceptance is not None:
            acceptance = Acceptance(*(column[b : b + 1] for column in acceptance))
            acceptance.offset.fill_(len(prompt) - 1)
        nodes = torch.empty(1, 1, dtype=torch.int32, device=model.device)
        root = Tree.from_choices([]).parents.to(model.device)
        self._bind_accept(
            logits[None],
            tokens[:, -1:].contiguous(),
            root,
            acceptance,
            nodes,
            self.accept_length[b : b + 1],
            self.next_token[b : b + 1],
        )()

    def _bind_accept(self, *arguments) -> Callable[[], None]:
        return bind(self.model.launch["verify_tree"], *arguments)
