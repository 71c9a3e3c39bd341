"""Builds tokenizers from vocabularies that come without a tokenizer.json: GGUF metadata and SentencePiece models."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

# How each family cuts text before its merges apply, by GGUF's tokenizer.ggml.pre; the regexes are those of the
# families' own tokenizer.json. None: GPT-2's, which the ByteLevel pre-tokenizer has built in.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {"smollm": None, "default": None, "llama-bpe": _LLAMA3_SPLIT, "qwen2": _QWEN2_SPLIT}

_SPACE = "\u2581"  # how SentencePiece spells a space


class TokenType(IntEnum):
    """What a vocabulary entry is; GGUF and SentencePiece share the numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and the named tokens its source declares.

    Attributes:
        backend: the tokenizer.
        special_tokens: "bos_token", "eos_token", "unk_token", "pad_token" -> token, as far as they are declared.
    """

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]


def vocabulary_from_gguf(fields: Mapping[str, Any], path: Path) -> Vocabulary:
    """The tokenizer that a GGUF file's metadata `fields` describe, BOS and EOS included; `path` is named in errors.

    Raises:
        CheckpointError: for a tokenizer.ggml.model or .pre that is not supported, or a damaged vocabulary.
    """
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    tokens = fields.get("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(f"{path}: no tokenizer inside (tokenizer.ggml.tokens is missing)")
    types = fields.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    if model == "gpt2":
        if pre not in _SPLITS:
            raise CheckpointError(
                f"{path}: pre-tokenizer {pre!r} (tokenizer.ggml.pre) is not supported; supported: {', '.join(_SPLITS)}"
            )
        backend = _byte_level_bpe(tokens, fields.get("tokenizer.ggml.merges", []), pre, path)
    elif model == "llama":
        scores = fields.get("tokenizer.ggml.scores")
        if scores is None:
            raise CheckpointError(f"{path}: tokenizer.ggml.scores is missing")
        backend = _sentencepiece_bpe(tokens, scores, types, fields.get("tokenizer.ggml.add_space_prefix", True), path)
    else:
        raise CheckpointError(
            f"{path}: tokenizer {model!r} (tokenizer.ggml.model) is not supported; supported: gpt2, llama"
        )
    _mark_added(backend, tokens, types)
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and not 0 <= index < len(tokens):
            raise CheckpointError(f"{path}: tokenizer.ggml.{key}_token_id {index} is outside {len(tokens)} tokens")
        if index is not None:
            special[f"{name}_token"] = tokens[index]
    # Where a file does not say, BOS is what its family's own tokenizer adds.
    add_bos = fields.get("tokenizer.ggml.add_bos_token", model == "llama" or pre == "llama-bpe")
    add_bos_eos(backend, special, bos=add_bos, eos=fields.get("tokenizer.ggml.add_eos_token", False))
    return Vocabulary(backend, special)


def vocabulary_from_sentencepiece(path: Path) -> Vocabulary:
    """The tokenizer of a SentencePiece BPE model file (tokenizer.model); it adds no BOS or EOS yet.

    Raises:
        CheckpointError: for a damaged file, a unigram model, or one that normalises its text.
    """
    try:
        model = list(_protobuf(path.read_bytes()))
        pieces = [dict(_protobuf(value)) for number, value in model if number == 1]
        trainer, normalizer = (
            {k: v for n, value in model if n == part for k, v in _protobuf(value)} for part in (2, 3)
        )
        tokens = [piece[1].decode() for piece in pieces]
        scores = [struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0] for piece in pieces]
        types = [piece.get(3, TokenType.NORMAL) for piece in pieces]
        ids = {name: trainer.get(number, default) for name, number, default in _NAMED_PIECES}
        special = {name: tokens[index] for name, index in ids.items() if index < len(tokens)}
    except (OSError, IndexError, KeyError, ValueError, AttributeError, TypeError, struct.error):
        raise CheckpointError(f"{path}: not a readable SentencePiece model; download it again") from None
    if not tokens:
        raise CheckpointError(f"{path}: a SentencePiece model without a vocabulary; download it again")
    if trainer.get(3, 1) != 2:
        raise CheckpointError(f"{path}: a SentencePiece model that is not BPE is not supported; add a tokenizer.json")
    if normalizer.get(2) or normalizer.get(4, 1):
        raise CheckpointError(
            f"{path}: a SentencePiece model that normalises its text is not supported; add a tokenizer.json"
        )
    backend = _sentencepiece_bpe(tokens, scores, types, bool(normalizer.get(3, 1)), path)
    _mark_added(backend, tokens, types)
    return Vocabulary(backend, special)


# Field numbers of sentencepiece_model.proto's TrainerSpec, and its defaults.
_NAMED_PIECES = (("unk_token", 40, 0), ("bos_token", 41, 1), ("eos_token", 42, 2))


def add_bos_eos(backend: tokenizers.Tokenizer, special: Mapping[str, str], *, bos: bool, eos: bool) -> None:
    """Makes `backend` put the named BOS before and EOS after a text, each if asked for and declared in `special`."""
    from tokenizers.processors import TemplateProcessing

    first = special.get("bos_token") if bos else None
    last = special.get("eos_token") if eos else None
    backend.post_processor = TemplateProcessing(
        single=[*([f"{first}:0"] if first else []), "$A:0", *([f"{last}:0"] if last else [])],
        special_tokens=[(token, backend.token_to_id(token)) for token in {first, last} if token],
    )


def _byte_level_bpe(tokens: list[str], merges: list[str], pre: str, path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pairs = [tuple(merge.split(" ")) for merge in merges]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise CheckpointError(f"{path}: tokenizer.ggml.merges is missing or damaged")
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        # Llama 3 looks a whole word up before it merges.
        backend = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path}: damaged tokenizer: {error}") from None
    split = _SPLITS[pre]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is not None:
        byte_level = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), byte_level])
    elif pre == "smollm":
        byte_level = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.pre_tokenizer = byte_level
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(
    tokens: list[str], scores: list[float], types: list[int], space_prefix: bool, path: Path
) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if not len(tokens) == len(scores) == len(types):
        raise CheckpointError(
            f"{path}: damaged tokenizer: {len(tokens)} tokens, {len(scores)} scores, {len(types)} types"
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.UNKNOWN), None)
    merges = _merges_from_scores(tokens, scores, types)
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, "first" if space_prefix else "never", split=False)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", left=1)] if space_prefix else steps)
    return backend


def _merges_from_scores(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """SentencePiece merges the neighbours whose union scores best: as a list, every split of every token, best first.

    Ties go as transformers orders them: by longer left, then longer right part.
    """
    normal = {
        token: (index, score)
        for index, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True))
        if kind == TokenType.NORMAL
    }
    splits = []
    for token, (_, score) in normal.items():
        parts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in parts if left in normal and right in normal]
        known.sort(key=lambda pair: (normal[pair[0]][0], normal[pair[1]][0]))
        splits += [(score, len(left), len(right), left, right) for left, right in known]
    splits.sort(key=lambda split: split[:3], reverse=True)
    return [(left, right) for *_, left, right in splits]


def _mark_added(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Control tokens are kept whole and hidden by decoding; user-defined ones are kept whole."""
    from tokenizers import AddedToken

    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    typed = list(zip(tokens, types, strict=True))
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, kind in typed if kind in special])
    backend.add_tokens([AddedToken(t, normalized=False) for t, kind in typed if kind == TokenType.USER_DEFINED])


def _protobuf(data: bytes) -> Iterator[tuple[int, Any]]:
    """A message's fields as (number, value): integers for varints, bytes for everything else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        length = {1: 8, 5: 4}[wire] if wire != 2 else varint()
        if at + length > len(data):
            raise ValueError("truncated")
        yield number, data[at : at + length]
        at += length
