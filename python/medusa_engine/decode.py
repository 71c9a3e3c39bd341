"""The decoding step: propose, verify, accept, compact. Plain decoding is the same step on the root alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from medusa_kernels import Tree
from medusa_kernels.launches import bind
from medusa_kernels.verify_tree import Acceptance

from .draft import Draft, Drafter, DynamicDraft
from .dynamic_tree import DynamicTree, layout_of
from .model import Forward, Model
from .prefill import prefill


class Outcome(NamedTuple):
    """What a step leaves for its reader, all in one block of memory: one copy takes it to the host.

    Attributes:
        block: int32, one dimension; the other four are views of it.
        tree_tokens: (batch, n), the tokens the step judged.
        accepted_nodes (batch, max_depth + 1), accept_length (batch,), next_token (batch,): what `verify_tree` said.
    """

    block: Tensor
    tree_tokens: Tensor
    accepted_nodes: Tensor
    accept_length: Tensor
    next_token: Tensor

    @classmethod
    def allocate(cls, batch: int, tree: Tree | DynamicTree, device: torch.device) -> Outcome:
        shapes = ((batch, tree.num_nodes), (batch, tree.max_depth + 1), (batch,), (batch,))
        block = torch.zeros(sum(map(_room, shapes)), dtype=torch.int32, device=device)
        parts = zip(block.split([_room(shape) for shape in shapes]), shapes, strict=True)
        return cls(block, *(part[: math.prod(shape)].view(shape) for part, shape in parts))

    def emitted(self) -> list[list[int]]:
        """The tokens that each sequence gained, in order; waits for the device."""
        return self.read(self.block.cpu())

    def read(self, host: Tensor) -> list[list[int]]:
        """The tokens that each sequence gained, in order, from a copy of the block on the host."""
        flat = host.tolist()
        tokens_at, nodes_at, length_at, next_at = (part.storage_offset() for part in self[1:])
        n, width = self.tree_tokens.shape[1], self.accepted_nodes.shape[1]
        emitted = []
        for b in range(len(self.next_token)):
            tokens, path = tokens_at + b * n, nodes_at + b * width
            accepted = flat[path + 1 : path + 1 + flat[length_at + b]]
            emitted.append([*(flat[tokens + node] for node in accepted), flat[next_at + b]])
        return emitted


def _room(shape: Sequence[int]) -> int:
    """int32s of a block that a part takes up: every part begins at a multiple of 256 bytes."""
    return -(-math.prod(shape) // 64) * 64


class Decoder:
    """The state of a batch between steps, with every launch bound to it.

    A step judges the tree whose root is the token that the base model chose last and emits accept_length + 1 tokens.

    Attributes:
        draft: the source's guesses for this batch; None where the tree is the root alone.
        layout: the tree as the kernels read it, or each sequence's own.
        outcome: what the step judged and what came of it; `tree_tokens`, `accepted_nodes`, `accept_length` and
            `next_token` are its parts.
        root_hidden: (batch, hidden_size), the final-norm row that `next_token` was chosen from.
        active: int32 (batch,), 0 once a sequence is retired: its cache then stands still.
        run_ahead: the steps that may follow a sequence's last one before it is retired.
        samples: whether a sequence of this text may be other than greedy; None before the first `start`.
    """

    def __init__(
        self,
        model: Model,
        drafter: Drafter | None,
        tree: Tree | DynamicTree,
        *,
        batch: int,
        max_seqlen: int,
        run_ahead: int = 0,
    ):
        self.model, self.tree = model, tree
        self.max_seqlen, self.run_ahead = max_seqlen, run_ahead
        # The step's own nodes stand behind the committed rows, also when those fill max_seqlen and more.
        self.cache = model.new_cache(batch, max_seqlen + run_ahead * (tree.max_depth + 1) + tree.num_nodes)
        device, n = model.device, tree.num_nodes

        self.outcome = Outcome.allocate(batch, tree, device)
        _, self.tree_tokens, self.accepted_nodes, self.accept_length, self.next_token = self.outcome
        self.layout = layout_of(tree, batch, device)
        self._forward = Forward(model, self.cache, n, self.layout.depths, self.layout.tree_mask)
        self._forward.tokens = self.tree_tokens
        hidden = self._forward.hidden
        logits, self._head = model.head(hidden)
        self._logits, self._hidden = logits.view(batch, n, -1), hidden.view(batch, n, -1)
        self._wrote_logits = True
        self.root_hidden = torch.empty(batch, model.config.hidden_size, dtype=hidden.dtype, device=device)
        self.active = torch.zeros(batch, dtype=torch.int32, device=device)
        self._first_rows = torch.arange(0, batch * n, n, dtype=torch.int32, device=device)
        self._compact = bind(
            model.launch["compact_kv"], self.cache.data, self.accepted_nodes, self.accept_length, self.cache.seqlens
        )
        self.samples: bool | None = None
        self._sampling: Acceptance | None = None
        self._accepts: dict[bool, Callable[[], None]] = {}
        self.draft: Draft | None = drafter.join(self) if n > 1 else None

    @property
    def batch(self) -> int:
        return self.cache.batch

    def start(self, prompts: list[list[int]], acceptance: Acceptance | None) -> list[int]:
        """Prefills the cache, one sequence after another, and returns the first token of each, chosen as by a step."""
        self._accept_by(acceptance)
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
        self.active[b].zero_()
        self.cache.seqlens[b].zero_()

    def step(self) -> list[list[int]]:
        """One verification of the whole batch: the tokens that each sequence gains, in order."""
        self.run()
        return self.emitted()

    def run(self) -> None:
        """The same, and nothing is read: the verbs know tensors that stay, and no value of theirs."""
        self.propose()
        self.verify()
        self.accept()
        self.compact()

    def propose(self) -> None:
        """The guesses stand at the tree's nodes, the last chosen token at its root."""
        self.tree_tokens[:, 0] = self.next_token
        if self.draft is not None:
            self.draft.propose()

    @property
    def logits(self) -> Tensor:
        """The last step's (batch, n, vocab), made now where that step needed none. On a GPU the last one's verified."""
        if not self._wrote_logits:
            self._head()
            self._wrote_logits = True
        return self._logits

    def verify(self) -> None:
        """The base model's judgement of every node, in one pass: its logits, or what `accept` makes them of."""
        self._forward.run()
        self._wrote_logits = not self._fused
        if self._wrote_logits:
            self._head()

    def accept(self) -> None:
        """The path the base model agrees with, and the token it chooses after it."""
        if self.samples:
            self._sampling.offset.copy_(self.cache.seqlens)  # the root stands right behind the committed rows
        self._accepts[self.samples]()

    def compact(self) -> None:
        """The accepted path's K/V rows and hidden row become the sequence's last."""
        if self.draft is not None:
            self.draft.advance()
        self._compact()
        last = self.accepted_nodes.gather(1, self.accept_length.long()[:, None])[:, 0]
        torch.index_select(self._forward.hidden, 0, last + self._first_rows, out=self.root_hidden)
        self.cache.seqlens.addcmul_(self.accept_length, self.active).add_(self.active)

    def step_tree(self, b: int) -> Tree:
        """The tree that sequence b had in the last step, its nodes as in `tree_tokens`; `tree` where that is static."""
        if isinstance(self.draft, DynamicDraft):
            return self.tree.grown(self.draft.growth.nodes[b])
        return self.tree

    def emitted(self) -> list[list[int]]:
        """The tokens that each sequence gains by the step just accepted, in order."""
        return self.outcome.emitted()

    @property
    def _fused(self) -> bool:
        """Whether the LM head is part of `accept`. On the CPU that wins where all is greedy and nowhere else; on a GPU
        it has not been measured.
        """
        return self.model.backend == "cpu" and not self.samples

    def _accept_by(self, acceptance: Acceptance | None) -> None:
        """Copies the numbers to tensors that stay, since bound and captured launches know their addresses."""
        self.samples = acceptance is not None
        if acceptance is not None and self._sampling is None:
            self._sampling = Acceptance(*(column.clone() for column in acceptance))
        elif acceptance is not None:
            for kept, column in zip(self._sampling, acceptance, strict=True):
                kept.copy_(column)
        if self.samples not in self._accepts:
            judged = self.tree_tokens, self.layout.parents, self._sampling if self.samples else None
            came = self.accepted_nodes, self.accept_length, self.next_token
            if self._fused:
                launch = self.model.launch["verify_lm_head"]
                self._accepts[self.samples] = bind(launch, self._hidden, self.model.lm_head, *judged, *came)
            else:
                self._accepts[self.samples] = self._bind_accept(self._logits, *judged, *came)

    def _prefill(self, b: int, prompt: list[int]) -> None:
        """Fills sequence b's rows and chooses the token after the prompt."""
        model = self.model
        hidden = prefill(model, self.cache.sequence(b), prompt)
        self.root_hidden[b] = hidden[0]
        logits, head = model.head(hidden)
        head()
        acceptance = None
        if self.samples:
            acceptance = Acceptance(*(column[b : b + 1] for column in self._sampling))
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
