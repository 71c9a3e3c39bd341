"""The heads loader: every dialect, and an error that names the fault for every bad checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medusa_engine.heads import HeadsError, MedusaHeads, heads_from_tensors
from medusa_engine.heads_files import base_model_of, is_heads_only, load_heads
from tests.engine.heads_dialects import (
    HIDDEN,
    VOCAB,
    Tensors,
    assert_same,
    base_model,
    medusa,
    named,
    random_heads,
    tensorrt,
    vllm,
    write,
)

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
    (
        "no bias at all",
        medusa,
        drop(*[f"{h}.{i}.linear.bias" for h in range(3) for i in range(2)]),
        {},
        r"missing '0\.0\.linear\.bias' \(6,\)",
    ),
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
        ({"metadata": {"temperatures": 1.5}}, r"temperatures is 1\.5; it must be 2 numbers above 0, one per head"),
        ({"metadata": {"temperatures": [1.5]}}, r"temperatures is \[1\.5\]; it must be 2 numbers"),
        ({"metadata": {"temperatures": [1.0, "2"]}}, r"temperatures is \[1\.0, '2'\]; it must be 2 numbers"),
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
