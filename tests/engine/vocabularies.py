"""Tokenization written out in plain Python from its definition: the oracle where transformers has none."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import regex

# The regexes of llama.cpp's pre-tokenizers, one pass after the other.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
PASSES = {"smollm": [r"\p{N}", GPT2], "default": [GPT2], "llama-bpe": [LLAMA3], "qwen2": [QWEN2]}
SPACE = "▁"


def split(text: str, patterns: list[str]) -> list[str]:
    """Cuts `text` by each pattern in turn: matches, and what lies between them."""
    parts = [text]
    for pattern in patterns:
        cut = []
        for part in parts:
            at = 0
            for match in regex.finditer(pattern, part):
                cut += [part[at : match.start()], match.group()]
                at = match.end()
            cut.append(part[at:])
        parts = [part for part in cut if part]
    return parts


def merge(symbols: list[str], rank: dict) -> list[str]:
    """BPE as it is defined: merge the leftmost pair of the best rank, until there is none."""
    while len(symbols) > 1:
        ranked = [(rank[pair], i) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in rank]
        if not ranked:
            break
        _, i = min(ranked)
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]
    return symbols


def python_byte_bpe(fields: dict) -> Callable[[str], list[int]]:
    """A byte-level BPE tokenizer of a GGUF's metadata, in plain Python, without added BOS."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens, pre = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.pre"]
    index = {token: i for i, token in enumerate(tokens)}
    rank = {tuple(merge.split(" ")): i for i, merge in enumerate(fields["tokenizer.ggml.merges"])}
    whole = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind in (3, 4)]
    spelling = bytes_to_unicode()
    longest_first = sorted(whole, key=len, reverse=True)
    added = regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")") if whole else None
    cache: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        ids = []
        for piece in added.split(text) if added else [text]:
            if piece in whole:
                ids.append(index[piece])
                continue
            for word in split(piece, PASSES[pre]):
                if word not in cache:
                    spelled = "".join(spelling[byte] for byte in word.encode())
                    direct = pre == "llama-bpe" and spelled in index
                    symbols = [spelled] if direct else merge(list(spelled), rank)
                    cache[word] = [index[s] for s in symbols if s in index]  # a byte without a token is dropped
                ids += cache[word]
        return ids

    return encode


def special_ids(theirs) -> set[int]:
    """What transformers' decode skips."""
    return {index for index, token in theirs.added_tokens_decoder.items() if token.special}


def spm_fields(pieces: tuple) -> dict:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        **{
            f"tokenizer.ggml.{key}": values
            for key, values in zip(("tokens", "scores", "token_type"), pieces, strict=True)
        },
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def python_sentencepiece(pieces: tuple) -> Callable[[str], list[int]]:
    """SentencePiece BPE in plain Python, for a text without spelled-out special tokens."""
    index = {token: i for i, token in enumerate(pieces[0])}
    normal = {t: -score for t, score, kind in zip(*pieces, strict=True) if kind == 1}

    class Rank(dict):
        def __contains__(self, pair):
            return "".join(pair) in normal

        def __getitem__(self, pair):
            return normal["".join(pair)]

    def encode(text: str) -> list[int]:
        ids = []
        for symbol in merge(list(SPACE + text.replace(" ", SPACE)), Rank()):
            known = symbol in normal
            ids += [index[symbol]] if known else [index[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        return ids

    return encode
