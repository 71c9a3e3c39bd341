"""Checkpoints against transformers: folders, hub ids, every family, and what is said about broken ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_engine.checkpoint import CheckpointError, HeadsOnlyError, open_checkpoint
from tests.engine.models import assert_same_tensors

FAMILIES = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
}


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_safetensors(name, shards, tiny, tmp_path):
    model = tiny(name.split("-")[0], **FAMILIES[name]).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="40KB" if shards else "5GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 if shards else (tmp_path / "model.safetensors").exists()
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check_complete()
    assert checkpoint.path == tmp_path
    assert checkpoint.medusa_names() == frozenset()
    assert_same_tensors(checkpoint, model.state_dict(), model.config.tie_word_embeddings)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("shards", [False, True], ids=["whole", "sharded"])
def test_pytorch_bin(shards, legacy, tiny, tmp_path):
    model = tiny("llama", tie_word_embeddings=True).half()
    model.config.save_pretrained(tmp_path)
    # as old checkpoints have it: inv_freq buffers, and the tied head written out
    state = {**model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    names = sorted(state)
    parts = {"pytorch_model.bin": names}
    if shards:
        parts = {"pytorch_model-00001-of-00002.bin": names[:7], "pytorch_model-00002-of-00002.bin": names[7:]}
        index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for part, held in parts.items():
        held_state = {name: state[name].clone() for name in held}
        torch.save(held_state, tmp_path / part, _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(str(tmp_path))
    checkpoint.check_complete()
    assert_same_tensors(checkpoint, model.state_dict(), tied=True)


def test_medusa_2_tensors_are_companions(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    heads = {"medusa_head.0.0.linear.weight": torch.ones(64, 64), "medusa_head.0.1.weight": torch.ones(96, 64)}
    save_file({**load_file(tmp_path / "model.safetensors"), **heads}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check_complete()
    assert checkpoint.medusa_names() == heads.keys()


def test_every_fault_of_the_tensors_is_listed(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    tensors["lm_head.weight"] = torch.ones(97, 64)
    tensors |= {f"adapter.{i}": torch.ones(1) for i in range(20)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(tmp_path).check_complete()
    message = str(raised.value)
    assert "1 (model.layers.1.mlp.up_proj.weight) missing" in message
    assert "21 (adapter.0, adapter.1," in message
    assert "and 13 more) not used by this model" in message
    assert "1 (lm_head.weight (expected (96, 64), found (97, 64))) of the wrong shape" in message
    assert "\n" not in message


@pytest.fixture(scope="module")
def sound(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    tiny("llama").save_pretrained(folder, max_shard_size="40KB")
    return folder


def truncate(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def break_folder(folder: Path, how: str) -> None:
    first = sorted(folder.glob("model-*.safetensors"))[0]
    {
        "no config": lambda: (folder / "config.json").unlink(),
        "bad config": lambda: (folder / "config.json").write_text("{'a'"),
        "list config": lambda: (folder / "config.json").write_text("[1]"),
        "unknown model": lambda: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
        "no weights": lambda: [file.unlink() for file in folder.glob("model*")],
        "missing shard": first.unlink,
        "truncated shard": lambda: truncate(first, 0.5),
        "empty shard": lambda: first.write_bytes(b""),
        "lfs pointer": lambda: first.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        "bad index": lambda: (folder / "model.safetensors.index.json").write_text("{}"),
    }[how]()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", r"no config\.json; pass the folder that holds the model's config\.json"),
        ("bad config", r"config\.json: not readable as JSON"),
        ("list config", r"config\.json: expected a JSON object, found a list"),
        ("unknown model", r"config\.json: model_type 'gpt2' is not supported; supported: llama"),
        ("no weights", r"no weights; expected model\.safetensors, pytorch_model\.bin or a sharded one"),
        ("missing shard", r"missing 1 \(model-00001-of-\d+\.safetensors\) of \d+ shards; download them again"),
        ("truncated shard", r"model-00001-of-\d+\.safetensors: truncated or damaged .*; download it again"),
        ("empty shard", r"model-00001-of-\d+\.safetensors: truncated or damaged .*; download it again"),
        ("lfs pointer", "a Git LFS pointer, not the weights; run `git lfs pull`"),
        ("bad index", r"index\.json: no usable weight_map"),
    ],
)
def test_broken_folder(how, message, sound, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    break_folder(folder, how)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


class Payload:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("content", ["truncated", "garbage", "code", "a list"])
def test_broken_pytorch_bin(content, tiny, tmp_path, capsys):
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save({"code": Payload()} if content == "code" else [1] if content == "a list" else model.state_dict(), file)
    if content == "truncated":
        truncate(file, 0.7)
    if content == "garbage":
        file.write_bytes(b"not a checkpoint")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin: (truncated, damaged or not plain|not a state dict)"
    ):
        open_checkpoint(tmp_path)
    assert "this must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "file", "base"),
    [
        ({"base_model_name_or_path": "org/vicuna", "medusa_num_heads": 2}, "medusa_lm_head.pt", "org/vicuna"),
        ({"model_type": "medusa", "num_heads": 3}, "model.safetensors", None),
        ({"num_medusa_heads": 4, "base_model_name_or_path": "a/b"}, "model.safetensors", "a/b"),
        ({"model_type": "llama"}, "medusa_lm_head.safetensors", None),
        (None, "medusa_lm_head.pt", None),
    ],
)  # fmt: skip
def test_a_folder_of_heads_names_its_base_model(config, file, base, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(HeadsOnlyError, match="holds only Medusa heads, no base model") as raised:
        open_checkpoint(tmp_path)
    assert raised.value.base_model == base
    assert repr(base) in str(raised.value) if base else "names no base model" in str(raised.value)


@pytest.mark.parametrize(
    "name", ["nowhere", "/no/such/folder", "no/such/folder", "model.gguf", "org/model.gguf", "./a/b"]
)
def test_a_path_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder, and not a hub id of the form org/name"):
        open_checkpoint(name)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"notes\.txt: not a model; pass its folder, a \.gguf file"):
        open_checkpoint(tmp_path / "notes.txt")


def test_hub_id_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"org/name: no such file or folder here, and the hub did not give it .*pass its folder"
    ):
        open_checkpoint("org/name")


def test_hub_id_falls_back_to_pytorch_files(tiny, tmp_path, monkeypatch):
    model = tiny("llama")
    asked = []

    def snapshot_download(repo, *, allow_patterns, ignore_patterns):
        asked.append((repo, allow_patterns, ignore_patterns))
        model.config.save_pretrained(tmp_path)
        if "*.bin" in allow_patterns:
            torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("org/name")
    checkpoint.check_complete()
    assert_same_tensors(checkpoint, model.state_dict(), tied=False)
    assert [repo for repo, *_ in asked] == ["org/name", "org/name"]
    assert all(ignored == ["*/*"] for *_, ignored in asked)
