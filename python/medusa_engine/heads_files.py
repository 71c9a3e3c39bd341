"""Medusa heads on disk and on the hub: which files hold them, how they are read safely, and how ours are written."""

from __future__ import annotations

import itertools
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError
from .files import first_line, is_hub_id, read_json, read_json_if_any, replacing
from .heads import (
    DIALECTS,
    ROOT,
    SHAPE_KEYS,
    SHARED_LM_HEAD,
    TOKEN_MAP,
    HeadsError,
    Layout,
    MedusaHeads,
    base_name,
    contains_heads,
    heads_from_tensors,
    own_names,
    some,
)
from .hub import hub_folder

HEADS_FILE = "medusa_lm_head.safetensors"
_HEADS_FILES = (HEADS_FILE, "medusa_lm_head.pt")
# In order of preference; an index comes before the globs, which would match files that the index leaves out.
_MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_MODEL_GLOBS = ("*.safetensors", "*.pt", "*.bin")


def load_heads(
    path: str | os.PathLike, *, hidden_size: int | None = None, vocab_size: int | None = None
) -> MedusaHeads:
    """Load heads from a folder, a .safetensors, .pt or .bin file, or a Hugging Face hub id.

    Of a folder it reads `medusa_lm_head.safetensors` or `.pt`, else the model's own files, where a Medusa-2
    checkpoint's base tensors stay unread. config.json beside the weights is optional. `.pt` and `.bin` are read by
    `torch.load(weights_only=True)`. For `hidden_size`, `vocab_size` and what raises HeadsError see
    `heads_from_tensors`; here also a path or hub id that leads nowhere, and an empty, damaged or unsafe file.
    """
    place = Path(path).expanduser()
    if not place.exists():
        if not is_hub_id(os.fspath(path)):
            raise HeadsError(f"no heads at {place}: no such file or folder")
        try:
            place = hub_folder(os.fspath(path))
        except CheckpointError as error:
            raise HeadsError(f"no heads at {error}") from None
    files = _weight_files(place) if place.is_dir() else [place]
    names = {file: _tensor_names(file) for file in files}
    try:
        wanted = set(own_names(itertools.chain.from_iterable(names.values())).values())
    except HeadsError as error:
        raise HeadsError(f"heads in {place}: {error}") from None
    tensors = {name: t for file in files for name, t in _read(file, wanted.intersection(names[file])).items()}
    folder = place if place.is_dir() else place.parent
    config = read_json_if_any(folder / "config.json", HeadsError)
    return heads_from_tensors(tensors, config, source=str(place), hidden_size=hidden_size, vocab_size=vocab_size)


def save_heads(
    folder: str | os.PathLike,
    heads: MedusaHeads,
    config_extra: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write `medusa_lm_head.safetensors` (Medusa v2 names, rounded to `dtype`) and config.json into `folder`.

    One LM head for all heads is stored as `lm_head.weight`, a draft vocabulary as `token_map`, what the heads are told
    of the root as `root.weight`: our additions to v2.
    config.json gets the shape, `heads.metadata` and `config_extra`, the latter winning. Each file is replaced
    atomically, the weights first, so no reader sees half a file. Raises HeadsError if `config_extra` has a key that
    the heads themselves decide.
    """
    if clash := SHAPE_KEYS.intersection(config_extra or {}):
        raise HeadsError(f"config_extra has {some(sorted(clash))}, which the heads themselves decide")
    layout = Layout(DIALECTS[0], heads.num_heads, heads.num_layers)
    tensors = dict(zip(layout.blocks("weight"), heads.block_weight.flatten(0, 1), strict=True))
    if heads.block_bias is not None:
        tensors |= zip(layout.blocks("bias"), heads.block_bias.flatten(0, 1), strict=True)
    if heads.lm_head_weight is not None and heads.lm_head_weight.ndim == 3:
        tensors |= zip(layout.lm_heads(), heads.lm_head_weight, strict=True)
    elif heads.lm_head_weight is not None:
        tensors[SHARED_LM_HEAD] = heads.lm_head_weight
    if heads.root_weight is not None:
        tensors[ROOT] = heads.root_weight
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    config = {
        "base_model_name_or_path": heads.base_model_name_or_path,
        "medusa_num_heads": heads.num_heads,
        "medusa_num_layers": heads.num_layers,
        "hidden_size": heads.hidden_size,
        "version": "2",
        **({"medusa_fc_bias": False} if heads.block_bias is None and heads.num_layers else {}),
    }
    if heads.token_map is not None:
        tensors[TOKEN_MAP] = heads.token_map.detach().cpu().contiguous()
        config["truncated_vocab_size"] = len(heads.token_map)
    text = json.dumps({**config, **heads.metadata, **(config_extra or {}), **config}, indent=2) + "\n"
    with replacing(Path(folder) / HEADS_FILE) as file:
        save_file(tensors, file, metadata={"format": "pt"})
    with replacing(Path(folder) / "config.json") as file:
        file.write_text(text, encoding="utf-8")


def is_heads_only(folder: str | os.PathLike) -> bool:
    """Whether `folder` holds Medusa heads and no base model. Reads names only; False for what is no folder."""
    place = Path(folder).expanduser()
    if not place.is_dir() or any(place.glob("*.gguf")):
        return False
    has_heads = any((place / name).exists() for name in _HEADS_FILES)
    # Beside a heads file may lie what a trainer left, in files of any content: a model then has its usual names.
    files = _model_files(place, () if has_heads else _MODEL_GLOBS)
    names = [name for file in files for name in _tensor_names(file)]
    if any(name.startswith("model.") for name in names):
        return False
    return has_heads or contains_heads(names)


def base_model_of(folder: str | os.PathLike) -> str | None:
    """The `base_model_name_or_path` in the folder's config.json, if any; one relative to the folder as the path it is.

    Raises HeadsError for a broken config.
    """
    place = Path(folder).expanduser()
    name = base_name(read_json_if_any(place / "config.json", HeadsError))
    return str(place / name) if name and (place / name).exists() else name


def _weight_files(folder: Path) -> list[Path]:
    """The files to look for heads in."""
    heads_files = [folder / name for name in _HEADS_FILES if (folder / name).exists()][:1]
    if files := heads_files or _model_files(folder):
        return files
    raise HeadsError(f"no heads in {folder}: it has neither {' nor '.join(_HEADS_FILES)} nor a model's weights")


def _model_files(folder: Path, globs: Iterable[str] = _MODEL_GLOBS) -> list[Path]:
    """The folder's weight files other than `_HEADS_FILES`; a sharded checkpoint's as its index lists them."""
    if found := [folder / name for name in _MODEL_FILES if (folder / name).exists()][:1]:
        if found[0].suffix != ".json":
            return found
        shards = read_json(found[0], HeadsError).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise HeadsError(f"cannot read {found[0]}: it has no weight_map from tensor names to files")
        return [folder / shard for shard in sorted(set(shards.values()))]
    for pattern in globs:
        if files := [file for file in sorted(folder.glob(pattern)) if file.name not in _HEADS_FILES]:
            return files
    return []


def _tensor_names(file: Path) -> list[str]:
    return list(_read(file, None))


def _read(file: Path, wanted: Iterable[str] | None) -> dict[str, Tensor | None]:
    """The wanted tensors of one file by name; None reads the names alone (the tensors are then None)."""
    if file.suffix not in (".safetensors", ".pt", ".bin"):
        raise HeadsError(f"cannot read {file}: heads must be a .safetensors, .pt or .bin file")
    if not file.is_file() or not file.stat().st_size:
        raise HeadsError(f"cannot read {file}: the file is {'empty' if file.is_file() else 'missing'}")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return dict.fromkeys(opened.keys()) if wanted is None else {n: opened.get_tensor(n) for n in wanted}
        # mmap leaves a large .bin's other tensors on disk; torch's format before 1.6 is no zip file and cannot
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # given a damaged file, the two libraries raise almost anything
        # torch's own text would be many lines that explain how to run the file's code all the same
        reason = first_line(error) if file.suffix == ".safetensors" else "torch.load(weights_only=True) refuses it"
        raise HeadsError(f"cannot read {file}: damaged, or more inside than tensors ({reason})") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise HeadsError(f"cannot read {file}: it must hold one dict from names to tensors")
    return dict.fromkeys(content) if wanted is None else {name: content[name] for name in wanted}
