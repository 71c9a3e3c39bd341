"""bench.gguf_export: the file reads back as the checkpoint it was made from."""

from __future__ import annotations

import json
import os

import pytest
import torch

from bench import gguf_export
from medusa_engine.checkpoint import open_checkpoint
from tests.engine.models import SPOKEN, random_folder, write_counting, write_tokenizer

# The largest error of a weight, relative to the largest weight of its block of 32 or fewer.
ERROR = {"BF16": 2**-8, "F16": 2**-11, "Q8_0": 0.6 / 127}


@pytest.mark.parametrize("precision", gguf_export.PRECISIONS)
def test_tensors_read_back(tmp_path, precision):
    folder, path = random_folder("llama"), tmp_path / "model.gguf"
    gguf_export.export(folder, precision, path)
    source, made = open_checkpoint(folder), open_checkpoint(path)
    assert made.names() == source.names()
    for name in source.names():
        expected, actual = source.tensor(name).float(), made.tensor(name).float()
        if expected.dim() == 1:
            assert torch.equal(actual, expected), name
            continue
        embedding = name == "model.embed_tokens.weight"
        blocks = (expected.view(-1, 32), actual.view(-1, 32))
        size = blocks[0].abs().amax(1, keepdim=True)
        if precision == "Q4_1" and not embedding:  # 16 levels between the block's least and largest
            size, limit = blocks[0].amax(1, keepdim=True) - blocks[0].amin(1, keepdim=True), 0.55 / 15
            assert (blocks[1] - blocks[0]).abs().max() > 1e-3, f"{name} is not stored in 4 bits"
        else:
            limit = ERROR["Q8_0" if precision == "Q4_1" else precision]
        assert ((blocks[1] - blocks[0]).abs() <= limit * size + 1e-7).all(), name


def test_config_and_tokenizer_read_back(tmp_path):
    folder, path = write_counting(tmp_path / "model"), tmp_path / "model.gguf"
    pieces = ["ab" if piece == "A" else piece for piece in SPOKEN]
    write_tokenizer(folder, pieces, chat_template="{{ messages[0].content }}")
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["merges"] = [["a", "b"]]  # a vocabulary without merges is damaged, to readers of GGUF
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    gguf_export.export(folder, "F16", path)
    source, made = open_checkpoint(folder), open_checkpoint(path)
    sizes = (
        "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim max_position_embeddings"
    )
    for field in sizes.split():
        assert getattr(made.config, field) == getattr(source.config, field), field
    assert made.config.rms_norm_eps == pytest.approx(source.config.rms_norm_eps)
    assert made.config.rope.theta == source.config.rope.theta
    assert (
        made.tokenizer.encode("cab!") == source.tokenizer.encode("cab!") == [pieces.index(p) for p in ("c", "ab", "!")]
    )
    assert made.tokenizer.chat_template == source.tokenizer.chat_template
    ids = list(range(len(SPOKEN)))
    assert made.tokenizer.decode(ids) == source.tokenizer.decode(ids)
    assert made.config.eos_token_ids == source.config.eos_token_ids


def test_exported_is_made_once_and_again_for_a_newer_model(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path))
    folder, made = random_folder("llama"), []
    monkeypatch.setattr(
        gguf_export, "export", lambda folder, precision, target: (made.append(precision), write(target))
    )

    def write(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"")

    path = gguf_export.exported(folder, "Q8_0")
    assert path == tmp_path / "gguf" / f"{folder.name}.Q8_0.gguf"
    assert gguf_export.exported(folder, "Q8_0") == path
    assert made == ["Q8_0"]
    os.utime(path, (0, 0))
    gguf_export.exported(folder, "Q8_0")
    assert made == ["Q8_0", "Q8_0"]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="precision must be one of BF16, F16, Q8_0, Q4_1, not 'Q2_K'"):
        gguf_export.export(random_folder("llama"), "Q2_K", tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="only llama models are exported, not 'qwen3'"):
        gguf_export.export(random_folder("qwen3"), "F16", tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())
