"""Heads on disk and on the hub: our own writer, what a folder holds, and bad files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from medusa_engine import heads_files
from medusa_engine.heads import HeadsError, MedusaHeads, contains_heads
from medusa_engine.heads_files import base_model_of, is_heads_only, load_heads, save_heads
from tests.engine.heads_dialects import (
    HIDDEN,
    VOCAB,
    Tensors,
    assert_same,
    base_model,
    medusa,
    random_heads,
    tensorrt,
    vllm,
    write,
)

# --- our writer -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(0, 4),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from(["own", "one", "base"]),
    st.none() | st.integers(1, VOCAB),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    num_heads: int,
    num_layers: int,
    hidden: int,
    bias: bool,
    lm: str,
    draft_vocab: int | None,
    root: bool,
    dtype: torch.dtype,
) -> None:
    heads = random_heads(
        num_heads,
        num_layers or (0 if lm == "own" else 1),
        hidden=hidden,
        bias=bias and num_layers > 0,
        own_lm=lm == "own",
        shared_lm=lm == "one",
        draft_vocab=draft_vocab,
        root=root,
        dtype=dtype,
    )
    folder = tmp_path_factory.mktemp("heads")
    save_heads(folder, heads, dtype=dtype)
    assert_same(load_heads(folder, hidden_size=hidden, vocab_size=VOCAB), heads)
    assert_same(load_heads(folder), heads)


def test_saved_format(tmp_path: Path) -> None:
    heads = MedusaHeads(
        *(getattr(random_heads(2, 1, draft_vocab=4), name) for name in ("block_weight", "block_bias")),
        token_map=torch.tensor([3, 1, 9, 0], dtype=torch.int32),
        root_weight=torch.randn(6, 6),
        base_model_name_or_path="SmolLM2",
        metadata={"accuracy": [[0.5, 0.1], [0.3]], "seed": 1},
    )
    save_heads(tmp_path / "new", heads, {"seed": 2, "temperatures": [1.2, 1.4]})
    tensors = load_file(tmp_path / "new" / "medusa_lm_head.safetensors")
    names = {"0.0.linear.weight", "0.0.linear.bias", "1.0.linear.weight", "1.0.linear.bias", "root.weight", "token_map"}
    assert set(tensors) == names
    assert {tensor.dtype for name, tensor in tensors.items() if name != "token_map"} == {torch.bfloat16}
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == {
        "base_model_name_or_path": "SmolLM2",
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
        "hidden_size": HIDDEN,
        "version": "2",
        "truncated_vocab_size": 4,
        "accuracy": [[0.5, 0.1], [0.3]],
        "seed": 2,
        "temperatures": [1.2, 1.4],
    }
    loaded = load_heads(tmp_path / "new")
    assert loaded.accuracy == [[0.5, 0.1], [0.3]]
    assert loaded.metadata == {"accuracy": loaded.accuracy, "seed": 2, "temperatures": [1.2, 1.4]}
    assert torch.equal(loaded.block_weight, heads.block_weight.bfloat16())
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"medusa_lm_head.safetensors", "config.json"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = random_heads()
    save_heads(tmp_path, heads, dtype=torch.float32)

    def fail(tensors: Tensors, file: Path, **_: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(heads_files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_heads(tmp_path, random_heads(1, 1))
    assert_same(load_heads(tmp_path), heads)
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_replaces_the_file_and_not_its_content(tmp_path: Path) -> None:
    """A reader that has the old file open keeps the whole old file."""
    old = random_heads()
    save_heads(tmp_path, old, dtype=torch.float32)
    (tmp_path / "opened.safetensors").hardlink_to(tmp_path / "medusa_lm_head.safetensors")
    save_heads(tmp_path, random_heads(1, 1))
    assert_same(load_heads(tmp_path / "opened.safetensors"), old)
    assert load_heads(tmp_path).num_heads == 1


def test_saving_refuses_to_contradict_the_shape(tmp_path: Path) -> None:
    with pytest.raises(HeadsError, match="config_extra has hidden_size, version, which the heads themselves decide"):
        save_heads(tmp_path, random_heads(), {"version": "3", "hidden_size": 4})
    assert not list(tmp_path.iterdir())


# --- what a folder holds --------------------------------------------------------------------------------------------


def test_is_heads_only_and_base_model_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = write(tmp_path / "heads", medusa(random_heads()), {"base_model_name_or_path": "b"}, "medusa_lm_head.pt")
    assert is_heads_only(heads)
    assert is_heads_only(write(tmp_path / "vllm", vllm(random_heads(), "medusa_heads."), {}))
    model = write(tmp_path / "model", base_model())
    assert not is_heads_only(model)
    assert not is_heads_only(tmp_path / "nowhere")
    assert base_model_of(heads) == "b"
    assert base_model_of(model) is base_model_of(tmp_path / "vllm") is None
    for left_by_a_trainer in ("training_args.bin", "optimizer.pt"):
        (heads / left_by_a_trainer).write_bytes(b"whatever")
    assert is_heads_only(heads)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert is_heads_only("~/heads")
    assert base_model_of("~/heads") == "b"
    (heads / "model.gguf").write_bytes(b"GGUF")
    assert not is_heads_only(heads)


def test_a_models_config_may_hold_what_was_measured_of_the_heads(tmp_path: Path) -> None:
    measured = {"accuracy": [[0.5]], "temperatures": [1.5] * random_heads().num_heads}
    others = {"model_type": "medusa", "num_heads": 3, "vocab_size": VOCAB}
    heads = write(tmp_path, vllm(random_heads()), {**others, **measured})
    assert load_heads(heads).metadata == measured


@pytest.mark.parametrize("dialect", [medusa, tensorrt, vllm])
def test_contains_heads(dialect: Callable[[MedusaHeads], Tensors]) -> None:
    names = list(dialect(random_heads()))
    assert contains_heads(names)
    assert contains_heads([*base_model(), *names])
    assert not contains_heads(base_model())
    assert not contains_heads([])


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    heads = random_heads()
    folder = write(tmp_path / "snapshot", medusa(heads), {}, "medusa_lm_head.safetensors")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    assert_same(load_heads("FasterDecoding/medusa-vicuna-7b-v1.3"), heads)

    def offline(name: str, **_: Any) -> str:
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = (
        r"no heads at FasterDecoding/x: no such file or folder here, and the hub did not give it "
        r"\(ConnectionError: no route to host\); check the name, the network and `hf auth login`, or download it "
        r"elsewhere and pass its folder$"
    )
    with pytest.raises(HeadsError, match=message):
        load_heads("FasterDecoding/x")


# --- bad files -------------------------------------------------------------------------------------------------------


def damaged_safetensors(folder: Path) -> Path:
    write(folder, medusa(random_heads()), name="heads.safetensors")
    content = (folder / "heads.safetensors").read_bytes()
    (folder / "heads.safetensors").write_bytes(content[:-40])
    return folder / "heads.safetensors"


def damaged_pt(folder: Path) -> Path:
    write(folder, medusa(random_heads()), name="heads.pt")
    content = (folder / "heads.pt").read_bytes()
    (folder / "heads.pt").write_bytes(content[: len(content) // 2])
    return folder / "heads.pt"


def file_of(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def folder_of(name: str, content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(folder, medusa(random_heads()), name="medusa_lm_head.safetensors")
        (folder / name).write_text(content)
        return folder

    return make


def pickled(content: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(content, folder / "heads.pt")
        return folder / "heads.pt"

    return make


def broken_index(folder: Path) -> Path:
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    return folder


BAD_FILES = [
    ("nowhere", lambda folder: folder / "nowhere", r"^no heads at .*nowhere: no such file or folder$"),
    ("empty folder", lambda folder: folder, r"^no heads in .*: it has neither medusa_lm_head\.safetensors nor "),
    ("other file type", file_of("heads.gguf", b"GGUF"), r"^cannot read .*heads\.gguf: heads must be a \.safetensors"),
    ("empty safetensors", file_of("h.safetensors", b""), r"^cannot read .*h\.safetensors: the file is empty$"),
    ("empty pt", file_of("h.pt", b""), r"^cannot read .*h\.pt: the file is empty$"),
    ("text as safetensors", file_of("h.safetensors", b"hello world, hello"), r"h\.safetensors: damaged, or more"),
    ("text as pt", file_of("h.pt", b"hello world"), r"h\.pt: damaged, or more inside than tensors"),
    ("cut safetensors", damaged_safetensors, r"heads\.safetensors: damaged, or more"),
    ("cut pt", damaged_pt, r"heads\.pt: damaged, or more inside than tensors"),
    ("code in a pt", pickled({"0.0.linear.weight": Path("x")}), r"heads\.pt: damaged, or more inside than tensors"),
    ("list in a pt", pickled([torch.ones(2)]), r"heads\.pt: it must hold one dict from names to tensors$"),
    ("nested pt", pickled({"state_dict": {"a": torch.ones(2)}}), r"heads\.pt: it must hold one dict"),
    ("config is no JSON", folder_of("config.json", "{"), r"config\.json: not readable as JSON"),
    (
        "config is a list",
        folder_of("config.json", "[]"),
        r"config\.json: expected a JSON object, found a list$",
    ),
    ("index without map", broken_index, r"index\.json: it has no weight_map from tensor names to files$"),
]


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in BAD_FILES], ids=[case[0] for case in BAD_FILES])
def test_bad_files(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(HeadsError, match=message) as caught:
        load_heads(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_pt_file_cannot_run_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"0.0.linear.weight": Payload()}, tmp_path / "heads.pt")
    with pytest.raises(HeadsError, match=r"heads\.pt: damaged, or more inside than tensors"):
        load_heads(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_name_in_two_files(tmp_path: Path) -> None:
    write(tmp_path, medusa(random_heads()), name="a.safetensors")
    write(tmp_path, medusa(random_heads()), name="b.safetensors")
    with pytest.raises(
        HeadsError, match=r"^heads in .*'0\.0\.linear\.bias' and '0\.0\.linear\.bias' are one and the same"
    ):
        load_heads(tmp_path)
