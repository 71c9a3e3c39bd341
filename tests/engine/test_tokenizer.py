"""Tokenizers, chat templates and streaming against transformers, and against BPE written out in Python."""

import itertools
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import regex
import tokenizers
from medusa_engine.checkpoint import CheckpointError, open_checkpoint
from medusa_engine.tokenizer import StreamDecoder, Tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

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


@pytest.fixture(scope="module")
def trained(strings) -> tuple[list[str], list[str]]:
    """A small byte-level vocabulary and its merges, learned without splitting numbers or before words."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    numbers = [f" {n} {n}{n} 20{n}" for n in range(10, 60)] * 5
    backend.train_from_iterator(
        [*strings, *numbers], trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(backend.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


@pytest.fixture(scope="module")
def byte_fields(trained) -> Callable[..., dict]:
    """byte_fields(pre, **fields) -> the metadata of a GGUF with that pre-tokenizer and three special tokens."""
    tokens, merges = trained
    extra = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]

    def make(pre: str, **fields) -> dict:
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": [*tokens, *extra],
            "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 3, 3, 4],
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": len(tokens),
            "tokenizer.ggml.eos_token_id": len(tokens) + 2,
            **{f"tokenizer.{key}": value for key, value in fields.items()},
        }

    return make


@pytest.mark.parametrize("pre", PASSES)
def test_byte_level_ids_equal_the_definition(pre, byte_fields, strings):
    fields = byte_fields(pre, **{"ggml.add_bos_token": False})
    tokenizer = Tokenizer.from_gguf(fields, Path("m.gguf"))
    encode = python_byte_bpe(fields)
    for text in strings:
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
        ({"ggml.model": "llama", "ggml.scores": [0.0]}, "damaged tokenizer: 1504 tokens, 1 scores"),
    ],
)
def test_bad_gguf_vocabulary(changes, message, byte_fields):
    with pytest.raises(CheckpointError, match=message) as raised:
        Tokenizer.from_gguf(byte_fields("smollm", **changes), Path("m.gguf"))
    assert str(raised.value).startswith("m.gguf: ")


# --- SentencePiece


@pytest.fixture(scope="module")
def pieces(strings) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a Llama-like SentencePiece BPE vocabulary with byte fallback."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "always")
    trainer = trainers.BpeTrainer(vocab_size=900, limit_alphabet=120, show_progress=False)
    backend.train_from_iterator(strings, trainer)
    model = json.loads(backend.to_str())["model"]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # As in real vocabularies, no piece is a part of a spelled-out byte token: transformers would merge on into it.
    merged = [t for t in dict.fromkeys(map("".join, model["merges"])) if t not in special and "<0" not in t]
    alphabet = [token for token in model["vocab"] if len(token) == 1]
    tokens = [*special, *merged, *alphabet]
    scores = [0.0] * len(special) + [-float(i) for i in range(len(merged))] + [-1e4 - i for i in range(len(alphabet))]
    return tokens, scores, [2, 3, 3, *[6] * 256, *[1] * (len(merged) + len(alphabet))]


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


# --- folders


def test_default_model_ids(default_model, strings):
    ours = Tokenizer.from_folder(default_model)
    theirs = AutoTokenizer.from_pretrained(default_model)
    ids = [ours.encode(text) for text in strings]
    assert ids == theirs(strings)["input_ids"]
    # SmolLM's definition, from the vocabulary alone: each digit apart, then GPT-2's words
    model = json.loads((default_model / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = sorted(model["model"]["vocab"], key=model["model"]["vocab"].get)
    added = {token["content"] for token in model["added_tokens"]}
    fields = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in added else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["model"]["merges"]],
        "tokenizer.ggml.pre": "smollm",
    }
    encode = python_byte_bpe(fields)
    assert ids == [encode(text) for text in strings]
    rare = regex.compile(r"[^\x00-\u04ff\u2000-\u9fff]")  # SmolLM's vocabulary lacks some bytes
    assert [ours.decode(i, False) for i, s in zip(ids, strings, strict=True) if not rare.search(s)] == [
        s for s in strings if not rare.search(s)
    ]
    assert [ours.decode(i) for i in ids] == theirs.batch_decode(ids, skip_special_tokens=True)
    assert ours.encode("a   123") == [ours.encode(part)[0] for part in ("a", "   ", "1", "2", "3")]
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.special_ids == set(theirs.all_special_ids) | {
        i for i, t in theirs.added_tokens_decoder.items() if t.special
    }


@pytest.mark.parametrize("pre", PASSES)
def test_saved_tokenizer_is_the_same_everywhere(pre, byte_fields, strings, tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}é"
    ours = Tokenizer.from_gguf(byte_fields(pre, chat_template=template), Path("m.gguf"))
    ours.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = [ours.encode(text) for text in strings]
    assert [again.encode(text) for text in strings] == ids
    assert theirs(strings)["input_ids"] == ids
    assert again.special_tokens == ours.special_tokens
    assert again.chat_template == theirs.chat_template == template
    assert again.special_ids == ours.special_ids
    assert (theirs.bos_token, theirs.eos_token) == ("<|endoftext|>", "<|im_end|>")


@pytest.fixture
def llama3_folder(byte_fields, tmp_path) -> Path:
    """A folder as transformers writes it, with BOS by the post-processor and tokens the configuration alone knows."""
    fields = byte_fields("llama-bpe")
    vocab = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    bos = "<|endoftext|>"
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, vocab[bos])]),
        ]
    )
    backend.enable_truncation(8)
    backend.enable_padding(length=12)
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="<|im_end|>", pad_token="[PAD]")
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", AddedToken("<tool>", lstrip=True)]})
    theirs.add_tokens(["<plain>"])
    theirs.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [{}, {"add_bos_token": False}, {"mask_token": "<mask>"}],
    ids=["as saved", "a claim about bos that tokenizer.json overrules", "new special"],
)
def test_folder_ids_equal_transformers(change, llama3_folder, strings):
    path = llama3_folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    theirs = AutoTokenizer.from_pretrained(llama3_folder)
    ours = Tokenizer.from_folder(llama3_folder)
    texts = [*strings, "x <tool>y<plain>z[PAD]<mask> <|im_start|>", "<plain>", ""]
    assert [ours.encode(text) for text in texts] == theirs(texts)["input_ids"]
    assert ours.special_ids == special_ids(theirs)
    assert len(ours.encode("a long text " * 20)) > 50


def test_missing_and_broken_tokenizer_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json or tokenizer\.model; copy the base model's"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not readable"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not readable as JSON"):
        Tokenizer.from_folder(tmp_path)


def test_bad_text(default_model):
    tokenizer = Tokenizer.from_folder(default_model)
    with pytest.raises(ValueError, match="unpaired surrogate at character 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(TypeError, match="text must be a str, found list"):
        tokenizer.encode([1, 2])
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([10**6, *tokenizer.encode("a")]) == "a"


# --- chat

TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama2": "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "blocks": """
{%- set ns = namespace(n=0) %}
    {% for message in messages %}
    {% if message.role == 'system' %}
        {%- continue %}
    {% endif %}
    {%- set ns.n = ns.n + 1 %}
{{ ns.n }}: {{ message | tojson }} {{ message.content | trim | tojson(indent=2) }}
    {% endfor %}
{% if tools is none and documents is none %}none{% endif %}
{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}
{{ dict(a=1)['a'] }} {{ unknown_name | default('x') }} {{ messages[-1].tool_calls is defined }}
""",
}
CHATS = [
    [{"role": "user", "content": "Hi <b>there</b> & 'you' é\n"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What?", "tool_calls": None},
        {"role": "assistant", "content": "That. "},
        {"role": "user", "content": "Why <|im_end|>?"},
    ],
]


@pytest.mark.parametrize("where", ["config", "jinja", "list", "both"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_equals_transformers(name, where, llama3_folder):
    config_path, template = llama3_folder / "tokenizer_config.json", TEMPLATES[name]
    config = json.loads(config_path.read_text())
    if where in ("jinja", "both"):
        (llama3_folder / "chat_template.jinja").write_text(template)
    if where != "jinja":
        named = [{"name": "rag", "template": "no"}, {"name": "default", "template": template}]
        config["chat_template"] = {"config": template, "list": named, "both": "the file wins"}[where]
        config_path.write_text(json.dumps(config))
    ours, theirs = Tokenizer.from_folder(llama3_folder), AutoTokenizer.from_pretrained(llama3_folder)
    assert ours.has_chat_template
    for chat in CHATS:
        for prompt in (True, False):
            expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert ours.render_chat(chat, add_generation_prompt=prompt) == expected
            ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=True)["input_ids"]
            assert ours.encode_chat(chat, add_generation_prompt=prompt) == ids
    assert ours.encode_chat("Hello") == ours.encode_chat([{"role": "user", "content": "Hello"}])


def test_default_models_chat(default_model):
    ours, theirs = Tokenizer.from_folder(default_model), AutoTokenizer.from_pretrained(default_model)
    for chat in CHATS:
        assert ours.encode_chat(chat) == theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ours.render_chat("Hello").endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, "Hi", "no chat template; pass chat=False"),
        ("x", [], "messages must not be empty"),
        ("x", ["Hi"], "a message must be a dict with 'role' and 'content', found 'Hi'"),
        ("x", [{"content": "Hi"}], "a message must be a dict with 'role'"),
        ("{{ raise_exception('roles must alternate') }}", "Hi", "refuses these messages: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "Hi", "refuses these messages: can only concatenate"),
        ("{{ messages.append(1) }}", "Hi", "refuses these messages: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "Hi", "refuses these messages: .*unsafe"),
        ("{% if %}", "Hi", "chat template is not valid Jinja"),
    ],
)
def test_bad_chat(template, messages, message, default_model):
    tokenizer = Tokenizer.from_folder(default_model)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        tokenizer.encode_chat(messages)


# --- streaming


@pytest.fixture(scope="module")
def all_kinds(byte_fields, pieces, default_model) -> dict[str, Tokenizer]:
    odd = byte_fields("llama-bpe")
    odd["tokenizer.ggml.tokens"] = [*odd["tokenizer.ggml.tokens"], "two words", "é", "漢字", "ab"]
    odd["tokenizer.ggml.token_type"] = [*odd["tokenizer.ggml.token_type"], 4, 4, 3, 4]
    fields = spm_fields(pieces)
    return {
        "smollm": Tokenizer.from_folder(default_model),
        "byte-level with odd added tokens": Tokenizer.from_gguf(odd, Path("m")),
        "sentencepiece": Tokenizer.from_gguf(fields, Path("m")),
        "sentencepiece without a first space": Tokenizer.from_gguf(
            {**fields, "tokenizer.ggml.add_space_prefix": False}, Path("m")
        ),
    }


KINDS = ["smollm", "byte-level with odd added tokens", "sentencepiece", "sentencepiece without a first space"]


@pytest.mark.parametrize("kind", KINDS)
def test_stream_joins_to_the_whole(kind, all_kinds, strings):
    tokenizer, rng = all_kinds[kind], random.Random(1)
    size = len(tokenizer._backend.get_vocab())
    special = sorted(tokenizer.special_ids)
    bytes_ = [i for i in range(size) if len(tokenizer._backend.id_to_token(i) or "") in (1, 6)]
    sequences = [tokenizer.encode(text) for text in strings[::4]]
    for _ in range(200):  # random tokens, rich in bytes that are not UTF-8, special tokens and ids that do not exist
        pools = [range(size), bytes_, special, [size, size + 5], range(size - 8, size)]
        sequences.append([rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 40))])
    for ids in sequences:
        stream, out, at = StreamDecoder(tokenizer), [], 0
        while at < len(ids):
            step = rng.randint(1, 5)
            out.append(stream.push(ids[at : at + step]))
            at += step
        out.append(stream.flush())
        assert "".join(out) == tokenizer.decode(ids), ids
        assert stream.push(ids) + stream.flush() == tokenizer.decode(ids)  # flushed, it starts anew


@pytest.mark.parametrize("kind", KINDS)
def test_stream_is_prompt_and_whole(kind, all_kinds):
    tokenizer = all_kinds[kind]
    ids = tokenizer.encode("Hello, world: ü, 日本 and 👩\u200d💻!")
    stream, seen = StreamDecoder(tokenizer), ""
    for at, index in enumerate(ids):
        seen += stream.push([index])
        whole = tokenizer.decode(ids[: at + 1])
        assert whole.startswith(seen)
        assert "\ufffd" not in seen
        # nothing that could be shown is held back but a run of byte tokens that is still going on
        if "\ufffd" not in whole and not regex.fullmatch("<0x..>", tokenizer._backend.id_to_token(index)):
            assert seen == whole
    assert seen + stream.flush() == "Hello, world: ü, 日本 and 👩\u200d💻!"


def test_stream_work_does_not_grow(all_kinds, monkeypatch):
    tokenizer = all_kinds["sentencepiece"]
    ids = tokenizer.encode("the work of one step is that of its own tokens " * 40)
    decoded = []
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: decoded.append(len(ids)) or decode(self, ids))
    stream = StreamDecoder(tokenizer)
    for index in ids:
        stream.push([index])
    assert sum(decoded) < 4 * len(ids)


def test_copied_folder_needs_nothing_else(default_model, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(default_model / name, tmp_path)
    assert Tokenizer.from_folder(tmp_path).has_chat_template
