"""Tiny checkpoints for the engine's tests: random ones of every family, and one that counts, so its text is known.

Folders are written once per session into a temporary place that goes with the process.
"""

from __future__ import annotations

import atexit
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from medusa_engine.heads import MedusaHeads
from medusa_engine.heads_files import save_heads

_TEMPORARY = tempfile.TemporaryDirectory(prefix="medusa-engine-tests-")
atexit.register(_TEMPORARY.cleanup)
FOLDER = Path(_TEMPORARY.name)


def shown(case: object) -> str:
    """A test case as its id says it: the same in all processes that share the tests, whose FOLDER differs."""
    return str(case).replace(f"{FOLDER}/", "")


SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
PROMPTS = ([5, 17, 80, 3], [44, 44, 9], [90, 1, 2, 3, 4, 5, 6, 7, 60, 61, 62], [33])

# What the counting model says, token after token, beginning anew at the end. Emoji and é are split into their bytes.
SPOKEN = (
    "<eos>",
    *"abcdefghijklmnopqrstuvwxyz",
    *(bytes([b]) for b in " 😀é".encode()),
    *(" stop", " the", " press", "!", "\n", "fin", "ish", " line"),
    *"ABCDEFGHIJKLMNOPQRSTUV",
)
EOS = 0


def token(text: str) -> int:
    """The counting model's token that is spelled like this."""
    return SPOKEN.index(text)


def spoken(ids: Sequence[int]) -> str:
    """The text of the counting model's tokens: what `generate` should say."""
    pieces = [SPOKEN[i] for i in ids if i != EOS]
    return b"".join(p if isinstance(p, bytes) else p.encode() for p in pieces).decode(errors="replace")


def random_model(family: str, **config):
    """A transformers model whose every part matters: sharp attention, norms and biases away from 1 and 0."""
    import transformers

    made = getattr(transformers, f"{CLASSES[family]}Config")(**{**SIZES, **config})
    torch.manual_seed(0)
    model = getattr(transformers, f"{CLASSES[family]}ForCausalLM")(made).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                gain = 3.0 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.normal_(std=gain * parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(mean=float("norm" in name), std=0.3)
    return model


def save_model(folder: Path, model) -> Path:
    """The model in transformers' own files, and a tokenizer that spells id i as the i-th printable character."""
    model.save_pretrained(folder)
    write_tokenizer(folder, [chr(0x4E00 + i) for i in range(model.config.vocab_size)])
    return folder


@cache
def random_folder(family: str = "llama") -> Path:
    """A random model of the family with biases or norms of its own where the family has them, untied."""
    config = {"head_dim": 32} if family == "qwen3" else {}
    return save_model(FOLDER / f"random-{family}", random_model(family, **config))


def write_tokenizer(folder: Path, pieces: Sequence[str | bytes], chat_template: str | None = None) -> None:
    """A byte-level tokenizer of exactly these tokens; it encodes single bytes, and `<...>` as special tokens."""
    alphabet = bytes_to_unicode()
    special = [p for p in pieces if isinstance(p, str) and len(p) > 2 and p[0] == "<"]
    raw = [p if isinstance(p, bytes) else p.encode() for p in pieces]
    names = [p if p in special else "".join(alphabet[b] for b in r) for p, r in zip(pieces, raw, strict=True)]
    backend = Tokenizer(BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<eos>"} if "<eos>" in special else {}
    config |= {"chat_template": chat_template} if chat_template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's spelling of bytes as printable characters."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in kept]
    return {**{b: chr(b) for b in kept}, **{b: chr(256 + i) for i, b in enumerate(moved)}}


def write_counting(folder: Path, *, peak: float = 20.0, chat_template: str | None = None, **config) -> Path:
    """A Llama that counts through SPOKEN: the logit of the token after the last one is `peak`, others are about 0.

    Its embeddings are the unit vectors, so the final norm's row is sqrt(vocab) times the last token's; attention runs,
    on random projections, but adds nothing.
    """
    vocab = len(SPOKEN)
    shape = {"hidden_size": vocab, "vocab_size": vocab, "num_hidden_layers": 1, "head_dim": 8}
    config = {**SIZES, **shape, "model_type": "llama", "eos_token_id": EOS, "rms_norm_eps": 1e-6, **config}
    generator = torch.Generator().manual_seed(0)
    inner, kv = config["intermediate_size"], config["num_key_value_heads"] * 8
    layer = "model.layers.0"
    tensors = {
        f"{layer}.self_attn.q_proj.weight": torch.randn(32, vocab, generator=generator),
        f"{layer}.self_attn.k_proj.weight": torch.randn(kv, vocab, generator=generator),
        f"{layer}.self_attn.v_proj.weight": torch.randn(kv, vocab, generator=generator),
        f"{layer}.self_attn.o_proj.weight": torch.zeros(vocab, 32),
        f"{layer}.mlp.gate_proj.weight": torch.randn(inner, vocab, generator=generator),
        f"{layer}.mlp.up_proj.weight": torch.randn(inner, vocab, generator=generator),
        f"{layer}.mlp.down_proj.weight": torch.zeros(vocab, inner),
        f"{layer}.input_layernorm.weight": torch.ones(vocab),
        f"{layer}.post_attention_layernorm.weight": torch.ones(vocab),
        "model.norm.weight": torch.ones(vocab),
        "model.embed_tokens.weight": torch.eye(vocab),
    }
    noise = 0.05 * torch.randn(vocab, vocab, generator=generator)
    tensors["lm_head.weight"] = (peak * torch.eye(vocab).roll(1, dims=0) + noise) / vocab**0.5
    write_tokenizer(folder, SPOKEN, chat_template)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def counting_heads(num_heads: int = 4, knows: Callable[[int, int], bool] = lambda head, last: True) -> MedusaHeads:
    """Heads for the counting model: head h is right after token `last` iff knows(h, last), else right at rank 1."""
    vocab = len(SPOKEN)
    lm_head = torch.zeros(num_heads, vocab, vocab)
    for head in range(num_heads):
        for last in range(vocab):
            right = (last + head + 2) % vocab
            lm_head[head, right, last] = 2.0
            if not knows(head, last):
                lm_head[head, (right + 7) % vocab, last] = 3.0
    return MedusaHeads(torch.zeros(num_heads, 1, vocab, vocab), None, lm_head)


@cache
def counting_folder(peak: float = 20.0) -> Path:
    return write_counting(FOLDER / f"counting-{peak}", peak=peak)


@cache
def counting_heads_folder(num_heads: int = 4, patchy: bool = False) -> Path:
    """Heads that are always right, or, `patchy`, the first 0 to 4 of them, depending on the last token."""
    knows = (lambda head, last: head < last * 7 % 5) if patchy else (lambda head, last: True)
    folder = FOLDER / f"counting-heads-{num_heads}-{patchy}"
    save_heads(folder, counting_heads(num_heads, knows), dtype=torch.float32)
    return folder


def forget(model) -> None:
    """transformers' dynamic RoPE keeps the frequencies of the longest text it has seen: back to none."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


@torch.no_grad()
def whole_logits(model, prompt: Sequence[int]) -> Tensor:
    """transformers' logits (len(prompt), vocab) from one pass."""
    forget(model)
    return model(input_ids=torch.tensor([list(prompt)])).logits[0].float()


@torch.no_grad()
def continuation(model, prompt: Sequence[int], length: int) -> tuple[list[int], Tensor]:
    """transformers' own greedy tokens, cached, and the logits (length, vocab) each was chosen from."""
    forget(model)
    cache, ids, tokens, rows = None, torch.tensor([list(prompt)]), [], []
    for _ in range(length):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0, -1].float())
        tokens.append(int(rows[-1].argmax()))
        ids = torch.tensor([[tokens[-1]]])
    return tokens, torch.stack(rows)


@torch.no_grad()
def fitted_heads(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    num_heads: int,
    layers: int = 1,
    bias: bool = True,
    draft_vocab: int | None = None,
) -> MedusaHeads:
    """Random blocks with LM heads fitted, by least squares, to the model's own greedy texts: often right, as real ones.

    Of a reduced vocabulary of `draft_vocab` tokens the map holds those the texts use most, in a scrambled order.
    """
    texts = [[*p, *continuation(model, p, 40)[0]] for p in prompts]
    hidden = [model.model(input_ids=torch.tensor([t])).last_hidden_state[0] for t in texts]
    size, vocab = hidden[0].shape[-1], model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(num_heads, layers, size, size, generator=generator) / size**0.5
    offset = 0.1 * torch.randn(num_heads, layers, size, generator=generator) if bias else None
    token_map = None
    if draft_vocab is not None:
        counts = torch.bincount(torch.tensor([t for text in texts for t in text]), minlength=vocab)
        token_map = counts.argsort(descending=True, stable=True)[:draft_vocab]
        token_map = token_map[torch.randperm(draft_vocab, generator=generator)]
    lm_heads = []
    for head in range(num_heads):
        rows, targets = [], []
        for text, states in zip(texts, hidden, strict=True):
            rows.append(states[: len(text) - head - 2])
            targets += text[head + 2 :]
        x = torch.cat(rows)
        for layer in range(layers):
            y = x @ weight[head, layer].T
            x = x + torch.nn.functional.silu(y if offset is None else y + offset[head, layer])
        onehot = torch.nn.functional.one_hot(torch.tensor(targets), vocab).float()
        onehot = onehot if token_map is None else onehot[:, token_map]
        # A ridge: some guesses stay wrong, and none hangs on the last bits.
        fitted = torch.linalg.solve(x.T @ x + 0.5 * torch.eye(size), x.T @ onehot)
        lm_heads.append(fitted.T.contiguous())
    return MedusaHeads(weight, offset, torch.stack(lm_heads), None if token_map is None else token_map.int())


def assert_same_tensors(checkpoint, state: dict, tied: bool) -> None:
    expected = {name: tensor for name, tensor in state.items() if not (tied and name == "lm_head.weight")}
    assert checkpoint.names() >= expected.keys()
    for name, tensor in expected.items():
        found = checkpoint.tensor(name)
        assert found.dtype == tensor.dtype, name
        assert checkpoint.shape(name) == tuple(tensor.shape), name
        assert torch.equal(found, tensor), name
