"""A folder's tokenizer, chat templates and streaming against transformers."""

import json
import random
from pathlib import Path

import pytest
import regex
from transformers import AutoTokenizer

from medusa_engine.checkpoint import CheckpointError
from medusa_engine.tokenizer import StreamDecoder, Tokenizer
from tests.engine.vocabularies import PASSES, python_byte_bpe, special_ids, spm_fields


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
    none = Tokenizer.from_folder(tmp_path)
    assert (none.decode([0, 1]), none.has_chat_template, none.eos_token_ids) == ("", False, ())
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json or tokenizer\.model: copy the base model's into it"):
        none.encode("a")
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
        ("{{ 1 / 0 }}", "Hi", "refuses these messages: division by zero"),
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
