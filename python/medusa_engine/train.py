"""Trains Medusa-1 heads: the base model frozen, the heads on its hidden rows, its LM head shared (Medusa, section
2.2.1), and, beyond the paper, told which token the base chose from that row.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from medusa_kernels.tree import MAX_NODES

from .dataset import Conversation
from .files import replacing
from .head_modules import Heads, Optimizer
from .heads import ROOT_EPS, MedusaHeads
from .stepping import best_paths, tokens_per_step

RANKS = 32  # ranks whose accuracy is measured: more than any tree of 256 nodes reads of a good head
MAX_PATHS = MAX_NODES - 1
HELD_OUT = 50  # every 50th conversation is held out
LEAST_CONVERSATIONS = 2  # one is held out, one trains
PIECE = 16  # consecutive positions that a step takes together: a step then sees many conversations, not two or three


@dataclass(frozen=True)
class TrainOptions:
    """What a run depends on besides its data; a resumed run must have the same."""

    heads: int = 4
    layers: int = 2
    draft_vocab: int = 8192
    epochs: int = 2
    batch: int = 1024  # positions of a step
    learning_rate: float = 1e-2
    weight_decay: float = 0.0  # per step and unit of learning rate
    soft_labels: float = 0.5  # share of the base's own distribution in the target, against the token it chose
    head_decay: float = 0.8  # head h's loss counts head_decay ** h, as in the paper
    root: bool = True  # whether the heads are told the root
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Pieces of conversations, one after another.

    Attributes:
        hidden: (positions, hidden_size), each row with the token it chose:
        root: (positions, hidden_size), that token's embedding, normed.
        labels: (positions,) draft ids, -1 outside the draft vocabulary. What head h should guess at row j is label
            j + h + 1, if `inside` (heads, positions) says that row j is to be learnt and that row in its conversation.
    """

    hidden: Tensor
    root: Tensor
    labels: Tensor
    inside: Tensor


class Trainer:
    """One training run in a folder: `state.pt` to resume from, `log.jsonl` with every loss and measurement. What a
    run on another text left there is not gone on with, since steps and draft vocabulary follow from the text.

    Attributes:
        step, total_steps: done, and of the whole run.
        positions: answer tokens that are trained on.
        begins_anew: whether the folder holds a run on another text.

    Args:
        folder: of the run; made when missing.
        lm_head, embedding: (vocab, hidden_size), the base's.
        conversations: with their hidden rows.

    Raises:
        ValueError: there is too little to train on, the folder holds another run, or this PyTorch is too old.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        options: TrainOptions,
        lm_head: Tensor,
        embedding: Tensor,
        conversations: list[Conversation],
        device: torch.device,
    ):
        check_torch()
        self.folder, self.options, self.device = Path(folder), options, device
        self.compute_dtype = _fast_dtype(device)
        train, self.held_out = split(conversations)
        self.train = train
        if not train:
            raise ValueError(f"training needs at least two conversations, not {len(conversations)}")
        self.token_map = most_frequent_tokens(train, options.draft_vocab, lm_head.shape[0])
        self._draft_id = torch.full((lm_head.shape[0],), -1, dtype=torch.int64)
        self._draft_id[self.token_map.long()] = torch.arange(len(self.token_map))
        self._lm_head = lm_head[self.token_map.long()].to(device, self.compute_dtype)
        self._embedding = embedding
        self.module = Heads(options.heads, options.layers, lm_head.shape[1], root=options.root).to(device)
        self._optimizer = Optimizer(self.module, options.learning_rate, options.weight_decay)
        self.positions = sum(len(c.answer) for c in train)
        self._pieces = [(i, start) for i, c in enumerate(train) for start in range(0, len(c.answer) - 1, PIECE)]
        if not self._pieces:
            raise ValueError("training needs an answer of at least two tokens, and all of these are shorter")
        self._text = _digest(conversations)
        self.step, self.begins_anew = 0, False
        self.total_steps = sum(1 for epoch in range(options.epochs) for _ in self._groups(epoch))
        self._restore()

    def run(self, on_step: Callable[[int, float], None], *, save_every: int = 100) -> None:
        """Trains to the end, or on from where the run in this folder stopped; Ctrl-C saves first."""
        try:
            for step, batch in self._remaining():
                loss = self._loss_and_gradients(batch)
                with _without_interruption():
                    self._optimizer.step(_schedule(step / self.total_steps))
                    self.step = step + 1
                self._log({"step": self.step, "loss": loss})
                on_step(self.step, loss)
                if self.step % save_every == 0:
                    self.save()
        finally:
            self.save()

    def result(self) -> MedusaHeads:
        """The heads as they are now, with the accuracy of each rank of each head on the held-out conversations."""
        ranks = [self.ranks(conversation) for conversation in self.held_out]
        accuracy = self.accuracy(ranks)
        paths = best_paths(ranks, MAX_PATHS, absent=RANKS)
        steps = {n: tokens_per_step(ranks, paths[: n - 1]) for n in (4, 8, 16, 32, 64)}
        self._log({"step": self.step, "accuracy": accuracy, "simulated_tokens_per_step": steps})
        metadata = {
            "accuracy": [[round(p, 5) for p in row] for row in accuracy],
            "paths": [list(path) for path in paths],
            "simulated_tokens_per_step": {str(n): round(value, 4) for n, value in steps.items()},
            "training": {**asdict(self.options), "positions": self.positions},
        }
        weight, bias = self.module.stacked("weight"), self.module.stacked("bias")
        root = None if self.module.root is None else self.module.root.weight.detach().cpu()
        return MedusaHeads(weight, bias, token_map=self.token_map, root_weight=root, metadata=metadata)

    @torch.no_grad()
    def ranks(self, conversation: Conversation) -> Tensor:
        """(heads, positions): the rank of the right token among each head's guesses; RANKS where it is lower or
        absent.
        """
        batch = self._batch([(conversation, 0)], len(conversation.answer))
        told = self.module.tell(batch.hidden, batch.root)
        rows = []
        for head in range(self.options.heads):
            labels = torch.where(batch.inside[head], batch.labels.roll(-head - 1), -1)
            logits = (self.module(told, head).to(self.compute_dtype) @ self._lm_head.T).float()
            right = logits.gather(1, labels.clamp(min=0)[:, None])
            rank = (logits > right).sum(dim=1).clamp(max=RANKS)
            rows.append(torch.where(labels < 0, RANKS, rank))
        return torch.stack(rows).cpu()

    def accuracy(self, ranks: list[Tensor]) -> list[list[float]]:
        """Per head and rank: the share of held-out positions where exactly that rank is right."""
        counts = torch.zeros(self.options.heads, RANKS + 1)
        positions = torch.zeros(self.options.heads)
        for conversation in ranks:
            for head, row in enumerate(conversation):
                inside = row[: max(0, len(row) - 1 - head)]
                counts[head] += torch.bincount(inside, minlength=RANKS + 1)
                positions[head] += len(inside)
        return (counts[:, :RANKS] / positions.clamp(min=1)[:, None]).tolist()

    def _loss_and_gradients(self, batch: Batch) -> float:
        """Sum over the heads of head_decay ** h times the mean loss; gradients are left in the module."""
        told = self.module.tell(batch.hidden, batch.root)
        guesses = [self.module(told, head) for head in range(self.options.heads)]
        losses, gradients = self._losses(batch, [x.detach() for x in guesses])
        decays = [self.options.head_decay**head for head in range(self.options.heads)]
        torch.autograd.backward(guesses, [g.mul_(d) for g, d in zip(gradients, decays, strict=True)])
        return sum(loss * decay for loss, decay in zip(losses, decays, strict=True))

    @torch.no_grad()
    def _losses(self, batch: Batch, guesses: list[Tensor]) -> tuple[list[float], list[Tensor]]:
        """Each head's mean loss, and its gradient for the head's rows, in slices whose logits fit a cache.

        The target of head h at a row is a mixture: the token that the base chose h + 1 rows further on, and, with
        weight `soft_labels`, the distribution it chose it from. Tokens outside the draft vocabulary leave the
        distribution alone.
        """
        soft = self.options.soft_labels
        losses, gradients = [0.0] * len(guesses), [torch.zeros_like(x) for x in guesses]
        counts = batch.inside.sum(dim=1).clamp(min=1).tolist()
        hidden = batch.hidden.to(self.compute_dtype)
        for part in torch.arange(len(hidden), device=self.device).split(512):
            target = (hidden[part] @ self._lm_head.T).float().softmax(dim=1).mul_(soft)
            chosen = batch.labels[part]
            known = (chosen >= 0).nonzero()[:, 0]
            target[known, chosen[known]] += 1 - soft
            mass = target.sum(dim=1, keepdim=True)
            for head, x in enumerate(guesses):
                use = (part > head) & batch.inside[head].roll(head + 1)[part]
                rows, wanted = part[use] - head - 1, target[use]
                logp = (x[rows].to(self.compute_dtype) @ self._lm_head.T).float().log_softmax(dim=1)
                losses[head] -= float((wanted * logp).sum()) / counts[head]
                slope = logp.exp_().mul_(mass[use]).sub_(wanted).div_(counts[head])
                gradients[head][rows] = (slope.to(self.compute_dtype) @ self._lm_head).to(x.dtype)
        return losses, gradients

    def _groups(self, epoch: int) -> Iterator[Tensor]:
        """Indices of each step's pieces, in an order that seed and epoch decide."""
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + epoch)
        return iter(torch.randperm(len(self._pieces), generator=generator).split(max(1, self.options.batch // PIECE)))

    def _remaining(self) -> Iterator[tuple[int, Batch]]:
        step = 0
        for epoch in range(self.options.epochs):
            for group in self._groups(epoch):
                if step >= self.step:
                    pieces = (self._pieces[i] for i in group.tolist())
                    yield step, self._batch([(self.train[i], start) for i, start in pieces], PIECE)
                step += 1

    def _batch(self, pieces: list[tuple[Conversation, int]], length: int) -> Batch:
        """`length` positions of each conversation from a start on, and the rows behind them that they look at."""
        heads = self.options.heads
        parts = [(c, slice(start, start + length + heads)) for c, start in pieces]
        tokens = torch.cat([c.answer[part] for c, part in parts]).long()
        hidden = torch.cat([c.hidden[part] for c, part in parts])
        sizes = torch.tensor([len(c.answer[part]) for c, part in parts])
        row = torch.cat([torch.arange(size) for size in sizes.tolist()])
        left = sizes.repeat_interleave(sizes) - 1 - row  # rows of the same piece that follow
        inside = torch.stack([(left > head) & (row < length) for head in range(heads)])
        root = F.rms_norm(self._embedding[tokens].float(), hidden.shape[1:], eps=ROOT_EPS)
        on_device = (x.to(self.device) for x in (hidden.float(), root, self._draft_id[tokens], inside))
        return Batch(*on_device)

    def save(self) -> None:
        state = {
            "options": asdict(self.options),
            "text": self._text,
            "step": self.step,
            "module": self.module.state_dict(),
            "optimizer": self._optimizer.state(),
        }
        # By path, torch would hide the operating system's error.
        with replacing(self.folder / "state.pt") as partial, open(partial, "wb") as file:
            torch.save(state, file)

    def _restore(self) -> None:
        state = saved_state(self.folder, self.options, self.device)
        self.begins_anew = state is not None and state["text"] != self._text
        if state is None or self.begins_anew:
            (self.folder / "log.jsonl").unlink(missing_ok=True)
        else:
            self.module.load_state_dict(state["module"])
            self._optimizer.restore(state["optimizer"])
            self.step = state["step"]

    def _log(self, row: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def split(conversations: list[Conversation]) -> tuple[list[Conversation], list[Conversation]]:
    """Those to train on, and those held out."""
    return [c for i, c in enumerate(conversations) if i % HELD_OUT], conversations[::HELD_OUT]


@contextlib.contextmanager
def _without_interruption() -> Iterator[None]:
    """Ctrl-C comes behind the block: half an update, saved as none, would be made again on top of itself."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's alone
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
    if held:
        raise KeyboardInterrupt


def check_torch() -> None:
    """Raises ValueError where PyTorch lacks the optimizer."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"training needs torch >= 2.9, which has the optimizer Muon, and this is {torch.__version__}: "
            "`pip install 'medusa-kernels[train]'`"
        )


def saved_state(
    folder: Path, options: TrainOptions, device: torch.device | str = "cpu", *, mmap: bool = False
) -> dict | None:
    """What a run with these options left in the folder; None where there was none.

    Raises:
        ValueError: it is of a run with other options, or damaged.
    """
    path = folder / "state.pt"
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
        saved, _ = dict(state["options"]), state["text"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read as a run to go on with: {reason}; without it, it begins anew"
        ) from None
    if saved != asdict(options):
        changed = [k for k, v in asdict(options).items() if saved.get(k) != v]
        raise ValueError(
            f"{path} is of a run with another {', '.join(changed)}: use another folder, or the same options"
        )
    return state


def _digest(conversations: list[Conversation]) -> str:
    """Says whether two runs train on the same tokens in the same order."""
    digest = hashlib.sha256()
    for conversation in conversations:
        digest.update(f"{conversation.answer_start} {len(conversation.ids)} ".encode())
        digest.update(conversation.ids.numpy().tobytes())
    return digest.hexdigest()


def most_frequent_tokens(conversations: list[Conversation], count: int, vocab_size: int) -> Tensor:
    """int32 (count,), ascending: the tokens that answers hold most often; equally rare ones by id."""
    frequency = torch.zeros(vocab_size, dtype=torch.int64)
    for conversation in conversations:
        frequency += torch.bincount(conversation.answer.long(), minlength=vocab_size)
    ranked = torch.sort(frequency, descending=True, stable=True).indices
    return ranked[: min(count, vocab_size)].sort().values.int()


def _schedule(progress: float) -> float:
    """Linear warm-up over the first 2%, then a cosine to 2% of the peak."""
    warm_up = 0.02
    if progress < warm_up:
        return (progress + 1e-3) / warm_up
    return 0.02 + 0.98 * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (progress - warm_up) / (1 - warm_up)))))


def _fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it; elsewhere fp32, which is faster than emulated bf16."""
    if device.type == "cuda":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32
