"""GGUF files against transformers and the gguf package: tensors, metadata, and what is said about broken ones."""

import struct

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from medusa_engine.checkpoint import CheckpointError, open_checkpoint
from medusa_engine.gguf_reader import GgufFile
from medusa_engine.rope import rope_tables
from tests.engine.models import assert_same_tensors

GGUF_MODELS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide": ("llama", {"head_dim": 32, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}


@pytest.mark.parametrize("name", GGUF_MODELS)
def test_gguf_tensors_and_config(name, tiny, write_gguf, tmp_path):
    arch, overrides = GGUF_MODELS[name]
    model = tiny(arch, **overrides)
    expected = write_gguf(tmp_path / "m.gguf", model, arch)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    checkpoint.check_complete()
    assert_same_tensors(checkpoint, model.state_dict(), model.config.tie_word_embeddings)
    assert checkpoint.names() == expected.keys()
    config = checkpoint.config
    assert (config.architecture, config.rms_norm_eps) == (arch, model.config.rms_norm_eps)
    assert config.tie_word_embeddings == model.config.tie_word_embeddings


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_gguf_agrees_with_transformers_own_reader(arch, tiny, write_gguf, tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny(arch, hidden_size=128), arch, "Q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert_same_tensors(open_checkpoint(tmp_path / "m.gguf"), theirs.state_dict(), tied=False)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf_types(kind, tiny, write_gguf, tmp_path):
    model = tiny("llama")
    expected = write_gguf(tmp_path / "m.gguf", model, "llama", kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    checkpoint.check_complete()
    native = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    for name, tensor in expected.items():
        found = checkpoint.tensor(name)
        assert found.dtype == (native if tensor.ndim > 1 else torch.float32), name
        assert torch.equal(found.float(), tensor), name
    weight = checkpoint.tensor("model.layers.0.mlp.up_proj.weight").float()
    original = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert 0 < (weight - original).abs().max() < 0.05  # rounded, but the same matrix


def q4_k_value(block: bytes, i: int) -> float:
    """Element i of a 256-element Q4_K block, from the format's definition in ggml."""
    d, dmin = np.frombuffer(block[:4], np.float16).astype(np.float32)
    packed, quants = block[4:16], block[16:]
    group = i // 32
    if group < 4:
        scale, low = packed[group] & 63, packed[group + 4] & 63
    else:
        scale = (packed[group + 4] & 15) | ((packed[group - 4] >> 6) << 4)
        low = (packed[group + 4] >> 4) | ((packed[group] >> 6) << 4)
    byte = quants[(i // 64) * 32 + i % 32]
    return d * scale * (byte & 15 if group % 2 == 0 else byte >> 4) - dmin * low


def q6_k_value(block: bytes, i: int) -> float:
    """Element i of a 256-element Q6_K block, from the format's definition in ggml."""
    half, within = i // 128, i % 128
    quarter, lane = within // 32, within % 32
    low = block[half * 64 + (quarter % 2) * 32 + lane]
    low = low & 15 if quarter < 2 else low >> 4
    high = (block[128 + half * 32 + lane] >> (2 * quarter)) & 3
    scale = np.frombuffer(block[192:208], np.int8)[half * 8 + quarter * 2 + lane // 16]
    d = np.frombuffer(block[208:210], np.float16).astype(np.float32)[0]
    return d * scale * ((low | (high << 4)) - 32)


@pytest.mark.parametrize(("kind", "value", "size"), [("Q4_K", q4_k_value, 144), ("Q6_K", q6_k_value, 210)])
def test_gguf_k_quants(kind, value, size, tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (3, 2 * size), dtype=np.uint8)
    for block in rows.reshape(-1, size):  # the fp16 scales must be numbers
        at = slice(0, 4) if kind == "Q4_K" else slice(208, 210)
        block[at] = rng.uniform(0.001, 0.01, (at.stop - at.start) // 2).astype(np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("t", rows, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GgufFile(tmp_path / "m.gguf").read("t")
    blocks = [bytes(block) for block in rows.reshape(-1, size)]
    expected = torch.tensor([value(block, i) for block in blocks for i in range(256)]).view(3, 512)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


def test_gguf_frequency_factors_are_llama3_rope(tiny, write_gguf, tmp_path):
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = tiny("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, **llama3})
    rotary = LlamaRotaryEmbedding(model.config)
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    write_gguf(tmp_path / "m.gguf", model, "llama", extra={"rope_freqs.weight": (plain / rotary.inv_freq).numpy()})
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    checkpoint.check_complete()
    cos, _ = rope_tables(checkpoint.config.rope, 16, 128)
    torch.testing.assert_close(cos, rotary(torch.zeros(1), torch.arange(128)[None])[0][0, :, :8], rtol=0, atol=1e-5)


def test_gguf_metadata_equals_the_gguf_packages_reader(tiny, write_gguf, tmp_path):
    fields = {
        "general.languages": ["en", "ἑλληνική"],
        "llama.rope.scaling.factor": 2.5,
        "general.name": "",
        "x.yes": True,
    }
    write_gguf(
        tmp_path / "m.gguf",
        tiny("llama"),
        "llama",
        "Q4_0",
        fields={**fields, "x.floats": [0.5, 1.5], "x.ints": [1, -2]},
    )
    ours = GgufFile(tmp_path / "m.gguf")
    theirs = gguf.GGUFReader(tmp_path / "m.gguf")
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.fields == expected
    assert {t.name: tuple(t.shape.tolist())[::-1] for t in theirs.tensors} == {
        n: t.shape for n, t in ours.tensors.items()
    }


@pytest.fixture(scope="module")
def sound_gguf(tiny, write_gguf, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, tiny("llama"), "llama")
    return path.read_bytes()


@pytest.mark.parametrize("keep", [0.0, 5, 17, 40, 300, 1500, 0.5, -1])
def test_truncated_gguf(keep, sound_gguf, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(sound_gguf[: int(keep * len(sound_gguf)) if isinstance(keep, float) else keep])
    with pytest.raises(
        CheckpointError, match=r"m\.gguf: (the file is truncated.*download it again|cannot read the file)"
    ):
        open_checkpoint(path)


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: b"GGML" + d[4:], r"not a GGUF file: it starts with b'GGML'"),
        (lambda d: patched(d, 4, struct.pack("<I", 1)), "GGUF version 1 is not supported"),
        (lambda d: patched(d, 4, struct.pack(">I", 3)), "GGUF version 50331648 is not supported; .* little-endian"),
        (lambda d: patched(d, 24, struct.pack("<Q", 1 << 60)), "the file is truncated"),
        (lambda d: d.replace(b"blk.1.ffn_up", b"blk.9.ffn_up"), r"missing; 1 \(model\.layers\.9\.mlp\.up_proj\.we"),
        (lambda d: d.replace(b"llama", b"gemma"), "general.architecture 'gemma' is not supported; supported: llama"),
    ],
)  # fmt: skip
def test_damaged_gguf(damage, message, sound_gguf, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(damage(sound_gguf))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path).check_complete()


def test_gguf_of_an_unsupported_type(tiny, write_gguf, tmp_path):
    extra = {"rope_freqs.weight": np.ones(8, np.int16)}
    write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", extra=extra)
    with pytest.raises(
        CheckpointError, match=r"'rope_freqs\.weight' is stored as I16, which is not supported; supported: F32"
    ):
        open_checkpoint(tmp_path / "m.gguf")
