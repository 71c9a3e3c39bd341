"""Self-distilled conversations on disk: shards of token ids, and the hidden rows that the heads are trained on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import replacing


@dataclass(frozen=True)
class Conversation:
    """One prompt and the base model's own greedy answer to it.

    Attributes:
        ids: int32 (tokens,), prompt and answer.
        answer_start: index of the answer's first token.
        hidden: bfloat16 (answer tokens, hidden_size) or None; row j is the base's final-norm row that chose answer
        token j.
    """

    ids: Tensor
    answer_start: int
    hidden: Tensor | None = None

    @property
    def answer(self) -> Tensor:
        return self.ids[self.answer_start :]


def shard_paths(folder: str | os.PathLike) -> list[Path]:
    return sorted(Path(folder).glob("shard-*.safetensors"))


def write_shard(path: Path, conversations: list[Conversation]) -> None:
    """Writes atomically: an interrupted run leaves whole shards only. Raises OSError if the disk does not take it."""
    ids = torch.cat([c.ids for c in conversations])
    tensors = {
        "ids": ids.to(torch.uint16 if int(ids.max()) < 2**16 else torch.int32),
        "lengths": torch.tensor([len(c.ids) for c in conversations], dtype=torch.int32),
        "answer_starts": torch.tensor([c.answer_start for c in conversations], dtype=torch.int32),
    }
    if conversations[0].hidden is not None:
        tensors["hidden"] = torch.cat([c.hidden for c in conversations]).bfloat16()
    try:
        with replacing(path) as partial:
            save_file(tensors, partial)
    except SafetensorError as error:  # it hides the operating system's error
        raise OSError(f"cannot write {path}: {error}") from None


def shard_size(path: str | os.PathLike) -> tuple[int, int]:
    """Conversations and answer tokens of one shard. Raises as `read_shard` does."""
    tensors = _tensors(path, lambda name: name != "hidden")
    _check(path, tensors)
    lengths, starts = tensors["lengths"], tensors["answer_starts"]
    return len(lengths), int((lengths - starts).sum())


def read_shard(path: str | os.PathLike) -> Iterator[Conversation]:
    """The conversations of one shard.

    Raises:
        ValueError: the file is not a shard, or is damaged.
    """
    tensors = _tensors(path)
    _check(path, tensors)
    ids = tensors["ids"].int()
    at_token = at_row = 0
    for length, start in zip(tensors["lengths"].tolist(), tensors["answer_starts"].tolist(), strict=True):
        hidden = None
        if "hidden" in tensors:
            hidden = tensors["hidden"][at_row : at_row + length - start]
        yield Conversation(ids[at_token : at_token + length], start, hidden)
        at_token += length
        at_row += length - start


def _check(path: str | os.PathLike, tensors: dict[str, Tensor]) -> None:
    ids, lengths, starts = tensors["ids"], tensors["lengths"], tensors["answer_starts"]
    integral = all(t.ndim == 1 and t.numel() and not t.is_floating_point() for t in (ids, lengths, starts))
    if not integral or len(lengths) != len(starts):
        raise ValueError(
            f"{path} is no shard of conversations: ids, lengths and answer_starts must be integers in one dimension, "
            "with a length and an answer_start for each conversation"
        )
    ids, lengths, starts = ids.long(), lengths.long(), starts.long()
    if int(ids.min()) < 0:
        raise ValueError(f"{path} holds token id {int(ids.min())}; ids are 0 or higher")
    if bool(((starts < 1) | (starts >= lengths)).any()) or int(lengths.sum()) != len(ids):
        raise ValueError(
            f"{path} is damaged: an answer must start behind a prompt's first token and before its conversation's end, "
            f"and the lengths, {int(lengths.sum())} in all, must add up to its {len(ids)} ids"
        )
    answers, hidden = int((lengths - starts).sum()), tensors.get("hidden")
    if hidden is not None and (hidden.ndim != 2 or len(hidden) != answers):
        raise ValueError(
            f"{path} holds hidden rows of shape {tuple(hidden.shape)}; it must be ({answers}, hidden_size)"
        )


def _tensors(path: str | os.PathLike, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if not {"ids", "lengths", "answer_starts"} <= names:
                raise ValueError(
                    f"{path} is no shard of conversations: it holds {', '.join(sorted(names)) or 'nothing'}"
                )
            return {name: file.get_tensor(name) for name in names if wanted(name)}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a shard of conversations: {error}") from None
