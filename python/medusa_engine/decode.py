"""The decoding step: propose, verify, accept, compact. Plain decoding is the same step on the root alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from medusa_kernels import Tree
from medusa_kernels.launches import bind
from medusa_kernels.verify_tree import Acceptance

from .draft import Draft, Drafter, DynamicDraft
from .dynamic_tree import DynamicTree, layout_of
from .model import Forward, Model
from .prefill import prefill


class Decoder:
    """The state of a batch between steps, with every launch bound to it.

    A step judges the tree whose root is the token that the base model chose last and emits accept_length + 1 tokens.

    Attributes:
        draft: the source's guesses for this batch; None where the tree is the root alone.
        layout: the tree as the kernels read it, or each sequence's own.
        tree_tokens: int32 (batch, n), the tokens the step judges.
        root_hidden: (batch, hidden_size), the final-norm row that `next_token` was chosen from.
        accepted_nodes, accept_length, next_token: what `verify_tree` said of them.
        active: int32 (batch,), 0 once a sequence is retired: its cache then stands still.
    """

    def __init__(self, model: Model, drafter: Drafter | None, tree: Tree | DynamicTree, *, batch: int, max_seqlen: int):
        self.model, self.tree = model, tree
        self.max_seqlen = max_seqlen
        # The step's own nodes stand behind the committed rows, also when those fill max_seqlen.
        self.cache = model.new_cache(batch, max_seqlen + tree.num_nodes)
        device, n = model.device, tree.num_nodes

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.layout = layout_of(tree, batch, device)
        self._forward = Forward(model, self.cache, n, self.layout.depths, self.layout.tree_mask)
        self.tree_tokens = self._forward.tokens
        logits, self._head = model.head(self._forward.hidden)
        self.logits = logits.view(batch, n, -1)
        self.root_hidden = torch.empty(batch, model.config.hidden_size, dtype=logits.dtype, device=device)
        self.accepted_nodes, self.accept_length, self.next_token = (
            ints(batch, tree.max_depth + 1),
            ints(batch),
            ints(batch),
        )
        self.active = ints(batch)
        self._sequence = torch.arange(batch, device=device)
        self._compact = bind(
            model.launch["compact_kv"], self.cache.data, self.accepted_nodes, self.accept_length, self.cache.seqlens
        )
        self._acceptance: Acceptance | None = None
        self.draft: Draft | None = drafter.join(self) if n > 1 else None

    @property
    def batch(self) -> int:
        return self.cache.batch

    def start(self, prompts: list[list[int]], acceptance: Acceptance | None) -> list[int]:
        """Prefills the cache, one sequence after another, and returns the first token of each, chosen as by a step."""
        self._acceptance = acceptance
        outputs = (self.accepted_nodes, self.accept_length, self.next_token)
        self._accept = self._bind_accept(self.logits, self.tree_tokens, self.layout.parents, acceptance, *outputs)
        for b, prompt in enumerate(prompts):
            self._prefill(b, prompt)
        self.active.fill_(1)
        if self.draft is not None:
            self.draft.start(prompts)
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
        emitted = self.emitted()
        self.compact()
        return emitted

    def propose(self) -> None:
        """The guesses stand at the tree's nodes, the last chosen token at its root."""
        self.tree_tokens[:, 0] = self.next_token
        if self.draft is not None:
            self.draft.propose()

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
        if self.draft is not None:
            self.draft.advance()
        self._compact()
        last = self.accepted_nodes.gather(1, self.accept_length.long()[:, None])[:, 0]
        self.root_hidden.copy_(
            self._forward.hidden.view(self.batch, self.tree.num_nodes, -1)[self._sequence, last.long()]
        )
        self.cache.seqlens.add_((self.accept_length + 1) * self.active)

    def step_tree(self, b: int) -> Tree:
        """The tree that sequence b had in the last step, its nodes as in `tree_tokens`; `tree` where that is static."""
        if isinstance(self.draft, DynamicDraft):
            return self.tree.grown(self.draft.growth.nodes[b])
        return self.tree

    def emitted(self) -> list[list[int]]:
        """The tokens that each sequence gains by the step just accepted, in order."""
        columns = (self.tree_tokens, self.accepted_nodes, self.accept_length, self.next_token)
        return [
            [*(tokens[node] for node in path[1 : length + 1]), bonus]
            for tokens, path, length, bonus in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def _prefill(self, b: int, prompt: list[int]) -> None:
        """Fills sequence b's rows and chooses the token after the prompt."""
        model = self.model
        hidden = prefill(model, self.cache.sequence(b), prompt)
        self.root_hidden[b] = hidden[0]
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
            torch.tensor([prompt[-1:]], dtype=torch.int32, device=model.device),
            root,
            acceptance,
            nodes,
            self.accept_length[b : b + 1],
            self.next_token[b : b + 1],
        )()

    def _bind_accept(self, *arguments) -> Callable[[], None]:
        return bind(self.model.launch["verify_tree"], *arguments)
