"""Tiny random models of every family, GGUF files of them, small vocabularies, and the default model."""

import ast
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from medusa_engine.cli import main
from medusa_engine.default_model import default_model_path
from tests.engine.vocabularies import LLAMA3, SPACE

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(autouse=True)
def _same_default_tree(monkeypatch):
    """tree="auto" is 6 nodes wherever the tests run, whatever pays on that processor."""
    monkeypatch.setattr("medusa_engine.engine.cheap_rows", lambda device: 6)


@pytest.fixture
def medusa(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """medusa("tree", "list") -> exit code, standard output, standard error of the command."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medusa", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """Where calibrations lie, in a cache of the test's own; it is not there yet."""
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibrations"


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched into the user's cache if it is not there yet."""
    return default_model_path(progress=False)


@pytest.fixture(scope="session")
def tiny():
    """tiny("llama", **config) -> a random-init transformers model, every tensor (norms and biases too) random."""
    import transformers

    classes = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

    def make(family: str, **overrides):
        config = getattr(transformers, f"{classes[family]}Config")(**{**SIZES, **overrides})
        torch.manual_seed(0)
        model = getattr(transformers, f"{classes[family]}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.1)
        return model

    return make


@pytest.fixture(scope="session")
def write_gguf():
    """write_gguf(path, model, arch, kind="F32", fields={}, extra={}) -> the state dict as the file should read back.

    Matrices are stored as `kind`, vectors as F32; q and k rows of the llama architecture are interleaved by the formula
    of llama.cpp's converter. `fields` adds or, with None, removes metadata; `extra` adds tensors.
    """
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }

    def gguf_name(name: str) -> str:
        stem, _, kind = name.rpartition(".")
        if stem in names:
            return f"{names[stem]}.{kind}"
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{names[part]}.{kind}"

    def interleave(w: np.ndarray, heads: int) -> np.ndarray:
        return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

    def uninterleave(w: np.ndarray, heads: int) -> np.ndarray:
        return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

    def write(path: Path, model, arch: str, kind: str = "F32", fields: dict | None = None, extra: dict | None = None):
        config = model.config
        metadata = {
            f"{arch}.block_count": config.num_hidden_layers,
            f"{arch}.context_length": config.max_position_embeddings,
            f"{arch}.embedding_length": config.hidden_size,
            f"{arch}.feed_forward_length": config.intermediate_size,
            f"{arch}.attention.head_count": config.num_attention_heads,
            f"{arch}.attention.head_count_kv": config.num_key_value_heads,
            f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            f"{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
            f"{arch}.vocab_size": config.vocab_size,
            **({f"{arch}.attention.key_length": config.head_dim} if hasattr(config, "head_dim") else {}),
            **(fields or {}),
        }
        writer = gguf.GGUFWriter(path, arch)
        for key, value in metadata.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            elif value is not None:
                types = {
                    bool: writer.add_bool,
                    int: writer.add_uint32,
                    float: writer.add_float32,
                    str: writer.add_string,
                }
                types[type(value)](key, value)
        quantisation = gguf.GGMLQuantizationType[kind]
        expected = {}
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            values = tensor.float().numpy()
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
                name.split(".")[-2]
            )
            swapped = heads is not None and arch == "llama"
            stored = interleave(values, heads) if swapped else values
            if stored.ndim == 1:
                writer.add_tensor(gguf_name(name), np.ascontiguousarray(stored))
            else:
                raw = gguf.quants.quantize(np.ascontiguousarray(stored), quantisation)
                writer.add_tensor(gguf_name(name), raw, raw_dtype=quantisation)
                stored = gguf.quants.dequantize(raw, quantisation)
            expected[name] = torch.from_numpy(np.ascontiguousarray(uninterleave(stored, heads) if swapped else stored))
        for name, values in (extra or {}).items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return expected

    return write


@pytest.fixture(scope="session")
def strings() -> list[str]:
    """1,000 texts: source lines and docstrings of the standard library, and random Unicode with awkward neighbours."""
    rng = random.Random(0)
    library = Path(ast.__file__).parent
    modules = [
        "ast.py",
        "json/decoder.py",
        "textwrap.py",
        "statistics.py",
        "typing.py",
        "email/header.py",
        "colorsys.py",
    ]
    texts: list[str] = []
    for module in modules:
        source = (library / module).read_text(encoding="utf-8")
        tree = ast.parse(source)
        kinds = (ast.FunctionDef, ast.ClassDef, ast.Module)
        texts += [
            doc for node in ast.walk(tree) if isinstance(node, kinds) and (doc := ast.get_docstring(node, clean=False))
        ]
        lines = source.splitlines(keepends=True)
        texts += ["".join(lines[i : i + rng.randint(1, 6)]) for i in range(0, len(lines), 9)]
    texts = rng.sample(texts, 600)
    atoms = [
        *" \t\n\r  \n\n'\"._-/\\<>|{}▁½²٣ſÅﬁ",
        *("'s", "'LL", "I'm", "can't", "12", "2024", "007", "Hello", " world", "   ", "    return x"),
        *("éé", "e\u0301", "漢字", "ひらがな", "한국어", "العربية", "हिन्दी", "👩\u200d💻", "🇫🇷"),
        *("\u00a0", "\u2028", "\u200b", "\ufeff", "\x00", "\ufffd"),
        *("<s>", "</s>", "<unk>", "<0x0A>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    ]
    for _ in range(300):
        texts.append("".join(rng.choice(atoms) for _ in range(rng.randint(0, 24))))
    while len(texts) < 1000:
        points = (rng.randrange(rng.choice([0x80, 0x800, 0x3000, 0x10000, sys.maxunicode + 1])) for _ in range(16))
        texts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    assert len(texts) == 1000
    return texts


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def byte_fields(trained) -> Callable[..., dict]:
    """byte_fields(pre, **fields) -> the metadata of a GGUF with that pre-tokenizer.

    It has three special tokens, a user-defined one, and a word that no merges lead to.
    """
    tokens, merges = trained
    extra = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "zqzq"]

    def make(pre: str, **fields) -> dict:
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": [*tokens, *extra],
            "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 3, 3, 4, 1],
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": len(tokens),
            "tokenizer.ggml.eos_token_id": len(tokens) + 2,
            **{f"tokenizer.{key}": value for key, value in fields.items()},
        }

    return make


@pytest.fixture(scope="session")
def pieces(strings) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a Llama-like SentencePiece BPE vocabulary with byte fallback."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "always")
    trainer = trainers.BpeTrainer(vocab_size=900, limit_alphabet=120, show_progress=False)
    backend.train_from_iterator(strings, trainer)
    model = json.loads(backend.to_str())["model"]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # As in real vocabularies, no piece is a part of a spelled-out byte token: transformers would merge on into it.
    spelled = "".join(special)
    merged = [t for t in dict.fromkeys(map("".join, model["merges"])) if t not in spelled]
    alphabet = [token for token in model["vocab"] if len(token) == 1]
    tokens = [*special, *merged, *alphabet]
    scores = [0.0] * len(special) + [-float(i) for i in range(len(merged))] + [-1e4 - i for i in range(len(alphabet))]
    return tokens, scores, [2, 3, 3, *[6] * 256, *[1] * (len(merged) + len(alphabet))]


@pytest.fixture
def llama3_folder(byte_fields, tmp_path) -> Path:
    """A folder as transformers writes it, with BOS by the post-processor and tokens the configuration alone knows."""
    from transformers import PreTrainedTokenizerFast

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
