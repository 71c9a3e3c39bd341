"""Self-distillation text: the base model writes user turns, then answers them greedily. No outside text, no outside
licence.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from medusa_kernels import Tree
from medusa_kernels.launches import bind
from medusa_kernels.verify_tree import MODES, Acceptance

from .dataset import Conversation, shard_paths, shard_size, write_shard
from .model import Forward, Model
from .prefill import hidden_rows
from .tokenizer import Tokenizer
from .train import LEAST_CONVERSATIONS

SHARD_POSITIONS = 10_000
MAX_USER_TOKENS, MAX_ANSWER_TOKENS = 64, 176
USER_TOP_P = 0.95
LEAST_TOKENS = 32  # for a user turn and its answer: a context without room for so many is too short
# A user turn's first tokens settle what it is about: warmer, for variety; the rest, cooler, for sense.
TOPIC_TOKENS, TOPIC_TEMPERATURE, USER_TEMPERATURE = 8, 1.1, 0.85
FREE = 0.02  # share of user turns that begin with no opening


@dataclass
class _Slot:
    """One conversation being written: `ids` so far, of which `fed` stand in the cache."""

    ids: list[int]
    user_start: int
    seed: int
    fed: int = 0
    answer_start: int | None = None
    hidden: list[Tensor] = field(default_factory=list)

    @property
    def temperature(self) -> float:
        """Of the user turn's next token."""
        return TOPIC_TEMPERATURE if self.fed - self.user_start < TOPIC_TOKENS else USER_TEMPERATURE


class Writer:
    """Writes conversations, many at a time, one token per slot and step.

    A conversation depends on its seed alone, not on its slot. Raises ValueError for a checkpoint without a chat
    template, or with one that does not say where a user's message ends, and for too short a context.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, slots: int):
        if not tokenizer.has_chat_template:
            raise ValueError(
                "self-distillation needs a checkpoint with a chat template; pass conversations with --data"
            )
        mark = "\u241e"
        rendered = tokenizer.render_chat([{"role": "user", "content": mark}])
        self._before, *others = rendered.split(mark)
        if len(others) != 1 or not others[0]:
            raise ValueError(
                "self-distillation needs a chat template that holds a user's message once and puts something behind "
                "it; pass conversations with --data"
            )
        self._tokenizer = tokenizer
        self._prefix, self._suffix = self._encode(self._before), self._encode_behind(others[0])
        self._eos = frozenset(model.config.eos_token_ids or tokenizer.eos_token_ids)
        self._special = frozenset(tokenizer.special_ids)
        context = min(model.config.max_position_embeddings, model.config.sliding_window or math.inf)
        room = context - len(self._prefix) - len(self._suffix)
        if room < LEAST_TOKENS:
            raise ValueError(
                f"self-distillation needs room for {LEAST_TOKENS} tokens beside the chat template's "
                f"{len(self._prefix) + len(self._suffix)}, and the model's context is {context}"
            )
        self._most_user = min(MAX_USER_TOKENS, room // 4)
        self._most_answer = min(MAX_ANSWER_TOKENS, room - self._most_user)
        rows = len(self._prefix) + len(self._suffix) + self._most_user + self._most_answer
        self._cache = model.new_cache(slots, rows)
        device, root = model.device, Tree.from_choices([])
        self._forward = Forward(model, self._cache, 1, root.depths.to(device), root.mask_words.to(device))
        logits, self._head = model.head(self._forward.hidden)
        self._next = torch.empty(slots, dtype=torch.int32, device=device)

        def column(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((slots,), value, dtype=dtype, device=device)

        self._how = Acceptance(
            mode=column(0, torch.int32),
            temperature=column(USER_TEMPERATURE, torch.float32),
            top_p=column(USER_TOP_P, torch.float32),
            top_k=column(0, torch.int32),
            posterior_threshold=column(0, torch.float32),
            posterior_alpha=column(0, torch.float32),
            seed=column(0, torch.int64),
            offset=column(0, torch.int64),
        )
        nodes, length = torch.empty(slots, 1, dtype=torch.int32, device=device), torch.empty_like(self._next)
        self._choose = bind(
            model.launch["verify_tree"],
            *(logits.view(slots, 1, -1), self._forward.tokens, root.parents.to(device), self._how),
            *(nodes, length, self._next),
        )
        # Beginnings of user turns, so that short questions and code are met as often as long instructions.
        self._openings = (files("medusa_engine") / "prompts/openings.txt").read_text(encoding="utf-8").splitlines()
        self._slots: list[_Slot] = []

    def conversations(self, seed: int):
        """Endless conversations, in the order in which they end."""
        seeds = (seed * 1_000_003 + i for i in itertools.count())
        self._slots = [self._begin(next(seeds)) for _ in range(self._cache.batch)]
        while True:
            for i, (slot, token, hidden) in enumerate(self._step()):
                if slot.fed < len(slot.ids):
                    continue  # the token that follows is already given
                if done := self._append(slot, token, hidden):
                    if isinstance(done, Conversation):
                        yield done
                    self._slots[i] = self._begin(next(seeds), slot.ids[: slot.fed])

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _encode_behind(self, text: str) -> list[int]:
        """Ids of what follows a user's message, as they are there: alone, SentencePiece would put a space before it."""
        message = self._before + "a"
        known, whole = self._encode(message), self._encode(message + text)
        return whole[len(known) :] if whole[: len(known)] == known else self._encode(text)

    def _begin(self, seed: int, cached: Sequence[int] = ()) -> _Slot:
        """`cached`: tokens whose rows stand in the slot's cache; those that the conversation begins with serve it."""
        generator = torch.Generator().manual_seed(seed)
        opening = self._openings[int(torch.randint(len(self._openings), (), generator=generator))]
        if float(torch.rand((), generator=generator)) < FREE and self._prefix:
            opening = ""
        # Together: at the seam, tokens may be others than those of either part.
        ids = self._encode(self._before + opening)[: len(self._prefix) + self._most_user // 2]
        return _Slot(ids, _shared(ids, self._prefix), seed, fed=min(_shared(ids, cached), len(ids) - 1))

    def _step(self):
        sampling, greedy = MODES.index("lossless"), MODES.index("greedy")
        fed = torch.tensor([s.fed for s in self._slots])
        self._forward.tokens[:, 0] = torch.tensor([s.ids[s.fed] for s in self._slots])
        self._cache.seqlens.copy_(fed)
        self._how.offset.copy_(fed)
        self._how.seed.copy_(torch.tensor([s.seed for s in self._slots]))
        self._how.temperature.copy_(torch.tensor([s.temperature for s in self._slots]))
        self._how.mode.copy_(torch.tensor([sampling if s.answer_start is None else greedy for s in self._slots]))
        self._forward.run()
        self._head()
        self._choose()
        hidden = self._forward.hidden.to("cpu", torch.bfloat16)
        for slot in self._slots:
            slot.fed += 1
        return list(zip(self._slots, self._next.tolist(), hidden, strict=True))

    def _append(self, slot: _Slot, token: int, hidden: Tensor) -> Conversation | bool:
        """Takes the model's next token. Returns the conversation once its answer ended, True for one to drop, else
        False.
        """
        if slot.answer_start is None:
            length = len(slot.ids) - slot.user_start
            if token == self._suffix[0] and length >= 3:
                slot.ids += self._suffix
                slot.answer_start = len(slot.ids)
                return False
            slot.ids.append(token)
            return length >= self._most_user or token in self._special
        slot.ids.append(token)
        slot.hidden.append(hidden.clone())
        if token not in self._eos and len(slot.ids) - slot.answer_start < self._most_answer:
            return False
        return Conversation(torch.tensor(slot.ids, dtype=torch.int32), slot.answer_start, torch.stack(slot.hidden))


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    differs = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differs, min(len(a), len(b)))


def is_complete(folder: Path, positions: int) -> bool:
    """Whether the folder's shards hold what `write_conversations` is to write."""
    conversations, written = _held(folder)
    return written >= positions and conversations >= LEAST_CONVERSATIONS


def write_conversations(writer: Writer, folder: Path, positions: int, seed: int) -> None:
    """Fills `folder` with shards until they hold `positions` answer tokens, in as many conversations as training needs;
    goes on after those that are there.
    """
    number = len(shard_paths(folder))
    conversations, written = _held(folder)
    with tqdm(total=positions, initial=min(written, positions), unit="tok", desc="write text", disable=None) as bar:
        shard: list[Conversation] = []
        size = 0
        for conversation in writer.conversations(seed * 1_000_003 + number):
            if written >= positions and conversations >= LEAST_CONVERSATIONS:
                return
            shard.append(conversation)
            size += len(conversation.answer)
            bar.update(len(conversation.answer))
            full = size >= min(SHARD_POSITIONS, positions - written)
            if full and conversations + len(shard) >= LEAST_CONVERSATIONS:
                write_shard(folder / f"shard-{number:04d}.safetensors", shard)
                number, conversations, written = number + 1, conversations + len(shard), written + size
                shard, size = [], 0


def _held(folder: Path) -> tuple[int, int]:
    """Conversations and answer tokens in the folder's shards."""
    sizes = [shard_size(path) for path in shard_paths(folder)]
    return sum(count for count, _ in sizes), sum(tokens for _, tokens in sizes)


def add_hidden(model: Model, conversations: list[Conversation]) -> list[Conversation]:
    """The same conversations with the hidden rows that chose their answers' tokens, by one prefill each."""
    cache = model.new_cache(1, max(len(c.ids) for c in conversations))
    result = []
    for conversation in tqdm(conversations, desc="hidden rows", disable=None):
        rows = [chunk.to("cpu", torch.bfloat16) for chunk in hidden_rows(model, cache, conversation.ids[:-1])]
        hidden = torch.cat(rows)[conversation.answer_start - 1 :]
        result.append(Conversation(conversation.ids, conversation.answer_start, hidden))
    return result
