"""Tokenizers built from GGUF metadata and SentencePiece models against transformers, and against their definition."""

import json
import struct
from pathlib import Path

import pytest
import regex
import tokenizers
from tokenizers import AddedToken
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from medusa_engine.checkpoint import CheckpointError, open_checkpoint
from medusa_engine.tokenizer import Tokenizer
from tests.engine.vocabularies import PASSES, SPACE, python_byte_bpe, python_sentencepiece, special_ids, spm_fields


@pytest.mark.parametrize("pre", PASSES)
def test_byte_level_ids_equal_the_definition(pre, byte_fields, strings):
    fields = byte_fields(pre, **{"ggml.add_bos_token": False})
    tokenizer = Tokenizer.from_gguf(fields, Path("m.gguf"))
    encode = python_byte_bpe(fields)
    assert (len(tokenizer.encode("zqzq")) == 1) == (pre == "llama-bpe")
    for text in [*strings, "zqzq zqzq"]:
        if pre == "qwen2" and not regex.fullmatch(r"[\x00-\u02ff]*", text):
            continue  # the next test: Qwen normalises, llama.cpp does not
        assert tokenizer.encode(text) == encode(text), repr(text)
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_qwen2_equals_transformers(byte_fields, trained, strings):
    _, merges = trained
    theirs = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(byte_fields("qwen2")["tokenizer.ggml.tokens"])},
        merges=[tuple(pair.split(" ")) for pair in merges],
        eos_token="<|im_end|>",
    )
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    theirs.add_tokens([AddedToken("<think>", normalized=False)])
    ours = Tokenizer.from_gguf(byte_fields("qwen2"), Path("m.gguf"))
    assert [ours.encode(text) for text in strings] == theirs(strings)["input_ids"]
    assert ours.encode("e\u0301") == ours.encode("é")


@pytest.mark.parametrize("pre", ["llama-bpe", "default"])
def test_gguf_ids_equal_transformers_own_reader(pre, byte_fields, strings, tiny, write_gguf, tmp_path):
    fields = byte_fields(pre, **{"ggml.add_bos_token": pre == "llama-bpe"})
    write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", fields=fields)
    ours = open_checkpoint(tmp_path / "m.gguf").tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    # Their GGUF reader misses Llama 3's whole-word lookup, which Llama 3's own tokenizer.json has.
    backend = json.loads(theirs.backend_tokenizer.to_str())
    backend["model"]["ignore_merges"] = pre == "llama-bpe"
    corrected = tokenizers.Tokenizer.from_str(json.dumps(backend))
    assert [ours.encode(text) for text in strings] == [e.ids for e in corrected.encode_batch(strings)]
    assert ours.special_ids == special_ids(theirs)


@pytest.mark.parametrize(
    ("pre", "fields", "bos", "eos"),
    [
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"ggml.add_bos_token": False}, False, False),
        ("smollm", {}, False, False),
        ("qwen2", {"ggml.add_bos_token": True, "ggml.add_eos_token": True}, True, True),
    ],
)
def test_bos_and_eos_of_a_gguf(pre, fields, bos, eos, byte_fields):
    fields = byte_fields(pre, **fields)
    tokenizer = Tokenizer.from_gguf(fields, Path("m.gguf"))
    bos_id, eos_id = fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]
    plain = python_byte_bpe(fields)("a text")
    assert tokenizer.encode("a text") == [bos_id] * bos + plain + [eos_id] * eos
    assert tokenizer.eos_token_ids == (eos_id,)
    assert tokenizer.special_tokens == {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    assert Tokenizer.from_gguf({**fields, "tokenizer.ggml.eot_token_id": 7}, Path("m")).eos_token_ids == (eos_id, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ggml.pre": "tekken"},
            r"pre-tokenizer 'tekken' \(tokenizer\.ggml\.pre\) is not supported; supported: smollm",
        ),
        ({"ggml.pre": None}, "pre-tokenizer None"),
        ({"ggml.model": "t5"}, r"tokenizer 't5' \(tokenizer\.ggml\.model\) is not supported; supported: gpt2, llama"),
        ({"ggml.tokens": None}, "no tokenizer inside"),
        ({"ggml.merges": ["ab"]}, "merges is missing or damaged"),
        ({"ggml.merges": ["ab zzz"]}, "damaged tokenizer"),
        ({"ggml.bos_token_id": 10**6}, "bos_token_id 1000000 is outside"),
        ({"ggml.model": "llama"}, "scores is missing"),
        ({"ggml.model": "llama", "ggml.scores": [0.0]}, "damaged tokenizer: 1505 tokens, 1 scores"),
    ],
)
def test_bad_gguf_vocabulary(changes, message, byte_fields):
    with pytest.raises(CheckpointError, match=message) as raised:
        Tokenizer.from_gguf(byte_fields("smollm", **changes), Path("m.gguf"))
    assert str(raised.value).startswith("m.gguf: ")


def test_sentencepiece_gguf_ids(pieces, strings, tiny, write_gguf, tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", fields=spm_fields(pieces))
    ours = open_checkpoint(tmp_path / "m.gguf").tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    encode = python_sentencepiece(pieces)
    assert ours.special_ids == {0, 1, 2}
    ids = theirs(strings)["input_ids"]
    for text, expected in zip(strings, ids, strict=True):
        assert ours.encode(text) == expected, repr(text)
        # The definition puts a space before a space, transformers does not. It is slow, so on the beginning alone.
        text = text[:120]
        if text and text[0] not in " ▁" and not any(s in text for s in ("<s>", "</s>", "<unk>")):
            assert ours.encode(text) == [1, *encode(text)], repr(text)
            assert ours.decode(ours.encode(text)) == text.replace(SPACE, " ")


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_model(pieces: tuple, trainer: bytes, normalizer: bytes) -> bytes:
    out = b""
    for token, score, kind in zip(*pieces, strict=True):
        body = field(1, token.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
        out += field(1, body + (field(3, kind) if kind != 1 else b""))
    return out + field(2, trainer) + field(3, normalizer)


BPE = field(3, 2) + field(35, 1)
IDENTITY = field(1, b"identity") + field(4, 0)


def test_sentencepiece_model_file(pieces, strings, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(pieces, BPE, IDENTITY))
    ours = Tokenizer.from_folder(tmp_path)
    gguf = Tokenizer.from_gguf(spm_fields(pieces), Path("m.gguf"))
    assert [ours.encode(text) for text in strings] == [gguf.encode(text) for text in strings]
    assert ours.special_tokens == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    # As Vicuna's folders have it
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": len(pieces[0])}))
    config = {"add_bos_token": False, "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.encode("<pad>")[-1] == len(pieces[0])
    assert ours.encode("a text") == gguf.encode("a text")[1:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda p: sentencepiece_model(p, BPE, IDENTITY)[:-40],
            "not a readable SentencePiece model; download it again",
        ),
        (lambda p: b"not a model", "not a readable SentencePiece model"),
        (lambda p: b"", "without a vocabulary"),
        (
            lambda p: sentencepiece_model(p, field(3, 1), IDENTITY),
            "that is not BPE is not supported; add a",
        ),
        (lambda p: sentencepiece_model(p, BPE, field(2, b"map") + field(4, 0)), "normalises its text is not supported"),
    ],
)
def test_bad_sentencepiece_model(content, message, pieces, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content(pieces))
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(tmp_path)
