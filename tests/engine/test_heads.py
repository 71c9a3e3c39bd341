"""The heads loader: every dialect, our own writer, and an error that names the fault for every bad checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from medusa_engine import heads_files
from medusa_engine.heads import HeadsError, MedusaHeads, contains_heads, heads_from_tensors
from medusa_engine.heads_files import base_model_of, is_heads_only, load_heads, save_heads

HIDDEN, VOCAB = 6, 11
Tensors = dict[str, Tensor]


def random_heads(
    num_heads: int = 3,
    num_layers: int = 2,
    *,
    hidden: int = HIDDEN,
    bias: bool = True,
    own_lm: bool = False,
    shared_lm: bool = False,
    draft_vocab: int | None = None,
    root: bool = False,
    dtype: torch.dtype = torch.float32,
) -> MedusaHeads:
    generator = torch.Generator().manual_seed(num_heads * 100 + num_layers)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rows = draft_vocab or VOCAB
    lm_head = random(num_heads, rows, hidden) if own_lm else random(rows, hidden) if shared_lm else None
    return MedusaHeads(
        random(num_heads, num_layers, hidden, hidden),
        random(num_heads, num_layers, hidden) if bias else None,
        lm_head,
        torch.randperm(VOCAB, generator=generator)[:draft_vocab].int() if draft_vocab else None,
        random(hidden, hidden) if root else None,
    )


def named(heads: MedusaHeads, block: str, lm_head: str = "", shared: str = "lm_head.weight") -> Tensors:
    """The heads' tensors under a dialect's names, each with storage of its own."""
    tensors: Tensors = {}
    for h in range(heads.num_heads):
        for layer in range(heads.num_layers):
            tensors[block.format(h=h, l=layer) + ".weight"] = heads.block_weight[h, layer].clone()
            if heads.block_bias is not None:
                tensors[block.format(h=h, l=layer) + ".bias"] = heads.block_bias[h, layer].clone()
        if heads.lm_head_weight is not None and heads.lm_head_weight.ndim == 3:
            tensors[lm_head.format(h=h, l=heads.num_layers) + ".weight"] = heads.lm_head_weight[h].clone()
    if heads.lm_head_weight is not None and heads.lm_head_weight.ndim == 2:
        tensors[shared] = heads.lm_head_weight.clone()
    if heads.token_map is not None:
        tensors["token_map"] = heads.token_map.long()
    if heads.root_weight is not None:
        tensors["root.weight"] = heads.root_weight
    return tensors


def medusa(heads: MedusaHeads, prefix: str = "") -> Tensors:
    return named(heads, prefix + "{h}.{l}.linear", prefix + "{h}.{l}")


def tensorrt(heads: MedusaHeads) -> Tensors:
    return named(heads, "medusa_heads.{h}.medusa_layers.{l}.linear", "medusa_heads.{h}.lm_head")


def vllm(heads: MedusaHeads, prefix: str = "") -> Tensors:
    tensors = named(heads, "blocks.{h}.layers.{l}", "lm_heads.{h}")
    return {prefix + name: tensor for name, tensor in tensors.items()}


def base_model() -> Tensors:
    return {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN),
        "model.layers.0.mlp.up_proj.weight": torch.randn(9, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": torch.randn(VOCAB, HIDDEN),
    }


def write(folder: Path, tensors: Tensors, config: dict | None = None, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same(loaded: MedusaHeads, wanted: MedusaHeads) -> None:
    for name in ("block_weight", "block_bias", "lm_head_weight", "token_map", "root_weight"):
        found, expected = getattr(loaded, name), getattr(wanted, name)
        assert (found is None) == (expected is None), name
        if expected is not None:
            assert found.dtype == expected.dtype, name
            assert torch.equal(found, expected), name


# --- dialects -------------------------------------------------------------------------------------------------------


def test_medusa_1(tmp_path: Path) -> None:
    """Hub files say 2 heads and hold 5: the tensors are right."""
    heads = random_heads(5, 1, own_lm=True, dtype=torch.float16)
    config = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}
    folder = write(tmp_path, medusa(heads), config, "medusa_lm_head.pt")
    loaded = load_heads(folder, hidden_size=HIDDEN, vocab_size=VOCAB)
    assert_same(loaded, heads)
    assert (loaded.num_heads, loaded.num_layers, loaded.hidden_size) == (5, 1, HIDDEN)
    assert loaded.draft_vocab_size == VOCAB
    assert loaded.base_model_name_or_path == base_model_of(folder) == "lmsys/vicuna-7b-v1.3"
    assert_same(load_heads(folder / "medusa_lm_head.pt"), heads)


def test_medusa_1_in_the_old_torch_format(tmp_path: Path) -> None:
    heads = random_heads(own_lm=True)
    torch.save(medusa(heads), tmp_path / "medusa_lm_head.pt", _use_new_zipfile_serialization=False)
    assert_same(load_heads(tmp_path), heads)


@pytest.mark.parametrize("config", [{"version": "2", "medusa_num_heads": 3}, None], ids=["version 2", "no config"])
def test_v2_shares_the_lm_head(tmp_path: Path, config: dict | None) -> None:
    heads = random_heads(dtype=torch.bfloat16)
    loaded = load_heads(write(tmp_path, medusa(heads), config, "medusa_lm_head.safetensors"))
    assert_same(loaded, heads)
    assert loaded.draft_vocab_size is None


@pytest.mark.parametrize("own_lm", [True, False], ids=["own", "shared"])
def test_medusa_2_inside_a_full_checkpoint(tmp_path: Path, own_lm: bool) -> None:
    heads = random_heads(own_lm=own_lm)
    tensors = {**base_model(), **medusa(heads, "medusa_head.")}
    config = {"model_type": "mistral", "hidden_size": HIDDEN, "vocab_size": VOCAB, "medusa_num_heads": 3}
    loaded = heads_from_tensors(tensors, config, source="a dict")
    assert_same(loaded, heads)
    assert loaded.metadata == {}
    folder = write(tmp_path / "one", tensors, config)
    assert_same(load_heads(folder), heads)
    assert not is_heads_only(folder)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_medusa_2_in_shards(tmp_path: Path, suffix: str) -> None:
    heads = random_heads()
    tensors = {**base_model(), **medusa(heads, "medusa_head.")}
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = sorted(tensors)
    shards = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for file, inside in shards.items():
        write(tmp_path, {name: tensors[name] for name in inside}, name=file)
    weight_map = {name: file for file, inside in shards.items() for name in inside}
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(load_heads(tmp_path), heads)
    (tmp_path / next(iter(shards))).unlink()
    with pytest.raises(HeadsError, match=rf"cannot read .*{stem}-00001-of-00002\.{suffix}: the file is missing"):
        load_heads(tmp_path)


@pytest.mark.parametrize("own_lm", [True, False], ids=["own", "shared"])
def test_tensorrt_llm(tmp_path: Path, own_lm: bool) -> None:
    heads = random_heads(4, 1, own_lm=own_lm)
    config = {"num_medusa_heads": 4, "num_medusa_layers": 1, "vocab_size": VOCAB, "hidden_size": HIDDEN}
    assert_same(load_heads(write(tmp_path, tensorrt(heads), config, "rank0.safetensors")), heads)


@pytest.mark.parametrize("full", [True, False], ids=["full model", "heads alone"])
def test_modelopt(tmp_path: Path, full: bool) -> None:
    heads = random_heads(2, 1, own_lm=True)
    tensors = medusa(heads, "medusa_heads.") | (base_model() if full else {})
    folder = write(tmp_path, tensors)
    assert_same(load_heads(folder), heads)
    assert is_heads_only(folder) is not full


VLLM_CONFIG = {
    "model_type": "medusa",
    "num_heads": 3,
    "num_hidden_layers": 2,
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
}


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("lm", [{"own_lm": True}, {"shared_lm": True}, {}], ids=["own", "one for all", "the base's"])
def test_vllm(tmp_path: Path, prefix: str, bias: bool, lm: dict) -> None:
    heads = random_heads(bias=bias, **lm)
    config = {**VLLM_CONFIG, "truncated_vocab_size": VOCAB, "medusa_fc_bias": bias, "accuracy": [[0.5]]}
    loaded = load_heads(write(tmp_path, vllm(heads, prefix), config))
    assert_same(loaded, heads)
    assert loaded.metadata == {"accuracy": [[0.5]]}


@pytest.mark.parametrize("lm", [{"own_lm": True}, {"shared_lm": True}, {}], ids=["own", "one for all", "the base's"])
def test_vllm_with_a_truncated_vocabulary(tmp_path: Path, lm: dict) -> None:
    heads = random_heads(draft_vocab=4, **lm)
    loaded = load_heads(write(tmp_path, vllm(heads), {**VLLM_CONFIG, "truncated_vocab_size": 4}))
    assert_same(loaded, heads)
    assert loaded.draft_vocab_size == 4


@pytest.mark.parametrize("lm", [{"own_lm": True}, {"shared_lm": True}], ids=["own", "one for all"])
@pytest.mark.parametrize("config", [VLLM_CONFIG, {}], ids=["config", "no config"])
def test_vllm_cuts_a_whole_lm_head_to_the_token_map(lm: dict, config: dict) -> None:
    whole = random_heads(**lm)
    token_map = torch.tensor([7, 0, 10, 3])
    loaded = heads_from_tensors({**vllm(whole), "token_map": token_map}, config, source="a dict")
    assert torch.equal(loaded.lm_head_weight, whole.lm_head_weight[..., token_map, :])
    assert loaded.token_map.dtype == torch.int32


@pytest.mark.parametrize("repeated", [True, False], ids=["each head", "head 0"])
def test_vllm_original_lm_head(repeated: bool) -> None:
    """vLLM keeps head 0's LM head for all heads; a file may hold it once or repeat it."""
    heads = random_heads(shared_lm=True)
    tensors = named(heads, "blocks.{h}.layers.{l}", shared="lm_heads.0.weight")
    if repeated:
        tensors |= {f"lm_heads.{h}.weight": tensors["lm_heads.0.weight"].clone() for h in (1, 2)}
    config = {**VLLM_CONFIG, "original_lm_head": True}
    assert_same(heads_from_tensors(tensors, config, source="a dict"), heads)
    if repeated:
        tensors["lm_heads.2.weight"] += 1
        with pytest.raises(HeadsError, match=r"'lm_heads.2.weight' differs from 'lm_heads.0.weight'"):
            heads_from_tensors(tensors, config, source="a dict")


@pytest.mark.parametrize("dialect", [medusa, tensorrt, vllm])
def test_heads_without_layers(dialect: Callable[[MedusaHeads], Tensors]) -> None:
    heads = random_heads(2, 0, own_lm=True, bias=False)
    loaded = heads_from_tensors(dialect(heads), {}, source="a dict")
    assert_same(loaded, heads)
    assert loaded.block_weight.shape == (2, 0, HIDDEN, HIDDEN)


def test_more_than_ten_heads_and_layers() -> None:
    """Numbers are compared as numbers: head 10 comes after head 9."""
    heads = random_heads(12, 11, hidden=2)
    assert_same(heads_from_tensors(medusa(heads), {}, source="a dict"), heads)


def test_a_folder_prefers_its_heads_file(tmp_path: Path) -> None:
    heads = random_heads()
    write(tmp_path, base_model())
    write(tmp_path, medusa(heads), name="medusa_lm_head.safetensors")
    assert_same(load_heads(tmp_path), heads)
    assert not is_heads_only(tmp_path)


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


def test_is_heads_only_and_base_model_of(tmp_path: Path) -> None:
    heads = write(tmp_path / "heads", medusa(random_heads()), {"base_model_name_or_path": "b"}, "medusa_lm_head.pt")
    assert is_heads_only(heads)
    assert is_heads_only(write(tmp_path / "vllm", vllm(random_heads(), "medusa_heads."), {}))
    model = write(tmp_path / "model", base_model())
    assert not is_heads_only(model)
    assert not is_heads_only(tmp_path / "nowhere")
    assert base_model_of(heads) == "b"
    assert base_model_of(model) is base_model_of(tmp_path / "vllm") is None
    (heads / "model.gguf").write_bytes(b"GGUF")
    assert not is_heads_only(heads)


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
        r"no heads at 'FasterDecoding/x': no such file or folder, and the Hugging Face hub did not give it "
        r"\(ConnectionError: no route to host\); without a network, pass a local folder or file$"
    )
    with pytest.raises(HeadsError, match=message):
        load_heads("FasterDecoding/x")


# --- bad checkpoints ------------------------------------------------------------------------------------------------


def drop(*names: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return edit


def put(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


def head_0_without_bias(tensors: Tensors) -> None:
    drop(*(name for name in list(tensors) if name.endswith("bias") and name.startswith("0.")))(tensors)


BAD_TENSORS = [
    ("head 1 layer 0 has no bias", medusa, drop("1.0.linear.bias"), {}, r"missing '1\.0\.linear\.bias' \(6,\)"),
    (
        "head 0 has no bias",
        medusa,
        head_0_without_bias,
        {},
        r"missing '0\.0\.linear\.bias' \(6,\), '0\.1\.linear\.bias'",
    ),
    ("no weight", medusa, drop("2.1.linear.weight"), {}, r"missing '2\.1\.linear\.weight' \(6, 6\)"),
    (
        "head numbers have a gap",
        medusa,
        drop("1.0.linear.weight", "1.0.linear.bias", "1.1.linear.weight", "1.1.linear.bias", "1.2.weight"),
        {},
        r"missing '1\.0\.linear\.weight' \(6, 6\), .* and 1 more \(read as Medusa names\)",
    ),
    ("one LM head is missing", medusa, drop("2.2.weight"), {}, r"missing '2\.2\.weight' \(11, 6\)"),
    (
        "LM head behind a missing layer",
        medusa,
        lambda t: t.update({"0.3.weight": t.pop("0.2.weight")}),
        {},
        r"missing '0\.2\.weight' \(11, 6\); left over '0\.3\.weight' \(11, 6\)",
    ),
    ("an extra tensor", medusa, put("0.norm.weight", torch.ones(6)), {}, r"left over '0\.norm\.weight' \(6,\)"),
    ("an LM head too many", medusa, put("lm_head.weight", torch.ones(11, 6)), {}, r"left over 'lm_head\.weight'"),
    ("a leading zero", medusa, put("00.0.linear.weight", torch.ones(6, 6)), {}, r"left over '00\.0\.linear\.weight'"),
    ("twice, with prefix", medusa, put("medusa_head.0.0.linear.bias", torch.ones(6)), {}, r"one and the same tensor"),
    ("two dialects", vllm, put("0.0.linear.weight", torch.ones(6, 6)), {}, r"left over .*\(read as vLLM names\)"),
    (
        "misshapen weight",
        medusa,
        put("1.0.linear.weight", torch.ones(6, 5)),
        {},
        r"'1\.0\.linear\.weight' has shape \(6, 5\); it must be \(6, 6\)",
    ),
    (
        "misshapen first weight",
        medusa,
        put("0.0.linear.weight", torch.ones(5, 5)),
        {},
        r"'0\.0\.linear\.weight' has shape \(5, 5\); it must be \(6, 6\)",
    ),
    (
        "misshapen bias",
        tensorrt,
        put("medusa_heads.0.medusa_layers.1.linear.bias", torch.ones(7)),
        {},
        r"'medusa_heads\.0\.medusa_layers\.1\.linear\.bias' has shape \(7,\); it must be \(6,\)",
    ),
    (
        "LM head of another size",
        vllm,
        put("lm_heads.1.weight", torch.ones(12, 6)),
        {},
        r"\(12, 6\); it must be \(11, 6\)",
    ),
    ("another hidden size", medusa, None, {"hidden_size": 8}, r"has shape \(6, 6\); it must be \(8, 8\)"),
    ("another vocabulary", medusa, None, {"vocab_size": 13}, r"has 11 rows; without a token_map .* vocabulary's 13"),
    (
        "no bias despite the config",
        vllm,
        drop(*[f"blocks.{h}.layers.{i}.bias" for h in range(3) for i in range(2)]),
        {"medusa_fc_bias": True},
        r"missing 'blocks\.0\.layers\.0\.bias'",
    ),
    ("no token_map", vllm, None, {"truncated_vocab_size": 4, "vocab_size": 11}, r"'token_map' is missing; .*4 of 11"),
    (
        "float token_map",
        vllm,
        put("token_map", torch.ones(4)),
        {},
        r"'token_map' is torch\.float32 \(4,\); it must be int",
    ),
    (
        "token_map of two axes",
        vllm,
        put("token_map", torch.ones(2, 2).int()),
        {},
        r"'token_map' is torch\.int32 \(2, 2\)",
    ),
    ("empty token_map", vllm, put("token_map", torch.ones(0).int()), {}, r"'token_map' is torch\.int32 \(0,\)"),
    (
        "negative id",
        vllm,
        put("token_map", torch.tensor([0, -1])),
        {},
        r"'token_map' holds id -1; ids must be in 0\.\.",
    ),
    ("id too large", vllm, put("token_map", torch.tensor([0, 11])), {"vocab_size": 11}, r"holds id 11; .* in 0\.\.10"),
    ("id repeats", vllm, put("token_map", torch.tensor([4, 2, 4])), {}, r"'token_map' holds id 4 more than once"),
    (
        "rows and map disagree",
        vllm,
        put("token_map", torch.arange(13)),
        {},
        r"has 11 rows; it must have the token_map's 13",
    ),
    (
        "misshapen root",
        medusa,
        put("root.weight", torch.ones(6, 5)),
        {},
        r"'root\.weight' has shape \(6, 5\); it must be",
    ),
    ("integers", medusa, put("0.0.linear.weight", torch.ones(6, 6).char()), {}, r"is torch\.int8; it must be float32"),
    (
        "two dtypes",
        medusa,
        put("2.0.linear.weight", torch.ones(6, 6).half()),
        {},
        r"float16; it must be torch\.float32",
    ),
    ("NaN", medusa, put("2.1.linear.bias", torch.full((6,), torch.nan)), {}, r"'2\.1\.linear\.bias' holds NaN"),
    (
        "infinity",
        medusa,
        put("0.2.weight", torch.full((11, 6), torch.inf)),
        {},
        r"'0\.2\.weight' holds NaN or infinity",
    ),
    ("accuracy of too many heads", medusa, None, {"accuracy": [[0.5]] * 4}, r"accuracy is .* at most 3 lists"),
    ("accuracy of words", medusa, None, {"accuracy": [["high"]]}, r"accuracy is \[\['high'\]\]; it must be"),
]


@pytest.mark.parametrize(
    ("dialect", "edit", "config", "message"), [case[1:] for case in BAD_TENSORS], ids=[case[0] for case in BAD_TENSORS]
)
def test_bad_tensors(dialect: Callable, edit: Callable | None, config: dict, message: str) -> None:
    tensors = dialect(random_heads(own_lm=True))
    if edit:
        edit(tensors)
    with pytest.raises(HeadsError, match=message) as caught:
        heads_from_tensors(tensors, config, source="heads.pt")
    assert str(caught.value).startswith("heads in heads.pt: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"no tensor is named as a head's$"),
        (base_model(), r"no tensor is named as a head's$"),
        ({"layers.0.weight": torch.ones(2)}, r"no tensor is named as a head's; found layers\.0\.weight"),
        ({"lm_heads.0.weight": torch.ones(11, 6)}, r"no tensor is named as a head's; found lm_head\.weight"),
    ],
    ids=["nothing", "a base model", "something else", "a shared LM head alone"],
)
def test_no_heads(tensors: Tensors, message: str) -> None:
    with pytest.raises(HeadsError, match=message):
        heads_from_tensors(tensors, {"original_lm_head": True}, source="x")


def test_sizes_given_by_the_caller_rule() -> None:
    tensors = medusa(random_heads(own_lm=True))
    with pytest.raises(HeadsError, match=r"it must be \(7, 7\)"):
        heads_from_tensors(tensors, {"hidden_size": HIDDEN}, source="x", hidden_size=7)
    with pytest.raises(HeadsError, match=r"vocabulary's 12"):
        heads_from_tensors(tensors, {"vocab_size": VOCAB}, source="x", vocab_size=12)


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"block_weight": torch.ones(2, 1, 4, 5)},
            r"block_weight has shape \(2, 1, 4, 5\); it must be \(heads, layers",
        ),
        ({"block_weight": torch.ones(0, 1, 4, 4)}, r"block_weight has shape \(0, 1, 4, 4\)"),
        ({"block_bias": torch.ones(2, 4)}, r"block_bias has shape \(2, 4\); it must be \(2, 1, 4\)"),
        (
            {"lm_head_weight": torch.ones(3, 9, 4)},
            r"lm_head_weight has shape \(3, 9, 4\); it must be \(2 heads, 9, 4\)",
        ),
        ({"lm_head_weight": torch.ones(9)}, r"lm_head_weight has shape \(9,\)"),
        ({"lm_head_weight": torch.ones(9, 4), "token_map": torch.ones(3).int()}, r"it must be .* or \(3, 4\)"),
        ({"token_map": torch.ones(3).long()}, r"token_map is torch\.int64 \(3,\); it must be int32"),
        ({"block_weight": torch.ones(2, 0, 4, 4)}, r"0 layers need an LM head for each head"),
        ({"root_weight": torch.ones(4, 3)}, r"root_weight has shape \(4, 3\); it must be \(4, 4\)"),
        ({"metadata": {"accuracy": 0.5}}, r"accuracy is 0\.5; it must be at most 2 lists of probabilities"),
        ({"metadata": {"paths": 5}}, r"paths holds 5; each path must be a list of ranks"),
        ({"metadata": {"paths": [[0], [-1]]}}, r"paths holds \[-1\]; each path must be a list of ranks, 0 or higher"),
        ({"metadata": {"paths": [[0], [0]]}}, r"paths holds \[0\] twice"),
        ({"metadata": {"paths": [[0, 1], [0]]}}, r"paths holds \[0, 1\] before its parent \[0\]"),
        ({"metadata": {"paths": [[0], [0, 0], [0, 0, 0]]}}, r"2 heads fill paths of at most 2 ranks"),
    ],
)
def test_bad_construction(fields: dict, message: str) -> None:
    with pytest.raises(HeadsError, match=message):
        MedusaHeads(**{"block_weight": torch.ones(2, 1, 4, 4), **fields})
