"""Opens a model from wherever it is: a folder, a GGUF file, a hub id, or the default model."""

from __future__ import annotations

import os
import zipfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .config import ModelConfig
from .errors import CheckpointError, HeadsOnlyError
from .files import first_line, is_hub_id, read_json, read_json_if_any
from .gguf_reader import GgufFile, GgufWeights
from .hub import hub_folder

if TYPE_CHECKING:
    from torch import Tensor

    from .tokenizer import Tokenizer

__all__ = ["Checkpoint", "CheckpointError", "HeadsOnlyError", "fetched", "open_checkpoint"]

_MEDUSA_PREFIXES = ("medusa_head.", "medusa_heads.")
_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SHOWN = 8  # names in a message before it only counts


class _Weights(Protocol):
    def names(self) -> frozenset[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def tensor(self, name: str) -> Tensor: ...


class Checkpoint:
    """A model's configuration, tokenizer and tensors. Nothing but headers is read until it is asked for.

    Attributes:
        path: the folder or the GGUF file.
        config: the model.
    """

    def __init__(self, path: Path, config: ModelConfig, weights: _Weights, gguf: GgufFile | None = None):
        self.path = path
        self.config = config
        self._weights = weights
        self._gguf = gguf

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises CheckpointError if it has none that is supported."""
        from .tokenizer import Tokenizer

        if self._gguf is not None:
            return Tokenizer.from_gguf(self._gguf.fields, self.path)
        return Tokenizer.from_folder(self.path)

    def names(self) -> frozenset[str]:
        """The names of all tensors, as Hugging Face checkpoints spell them."""
        return self._weights.names()

    def medusa_names(self) -> frozenset[str]:
        """The tensors of Medusa heads beside the model's own: under `medusa_head.` (Medusa-2) or `medusa_heads.`."""
        return frozenset(name for name in self.names() if name.startswith(_MEDUSA_PREFIXES))

    @property
    def lm_head_name(self) -> str:
        """The tensor that makes logits: an LM head's own where there is one, whatever the configuration ties."""
        return _EMBEDDING if self.config.tie_word_embeddings and _LM_HEAD not in self.names() else _LM_HEAD

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._weights.shape(name)

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU in the dtype it is stored in; quantised GGUF tensors as fp32.

        Tensors of safetensors files share the file's memory map: treat them as read-only.

        Raises:
            CheckpointError: if there is no such tensor or it cannot be read.
        """
        if name not in self.names():
            raise CheckpointError(f"{self.path}: no tensor {name!r}")
        return self._weights.tensor(name)

    def check_complete(self) -> None:
        """Every tensor the configuration calls for is there in its shape, and no other but known companions.

        Left over may be Medusa heads and rotary inv_freq buffers.

        Raises:
            CheckpointError: listing what is missing, left over or misshapen.
        """
        expected, found = self.config.tensor_shapes(), self.names()
        if _LM_HEAD in found:  # also beside tied embeddings
            expected[_LM_HEAD] = expected[_EMBEDDING]
        missing = [name for name in expected if name not in found]
        extra = sorted(name for name in found if name not in expected and not self._may_remain(name))
        shapes = {name: self.shape(name) for name in expected if name in found}
        wrong = [
            f"{name} (expected {expected[name]}, found {shape})"
            for name, shape in shapes.items()
            if tuple(shape) != expected[name]
        ]
        faults = [("missing", missing), ("not used by this model", extra), ("of the wrong shape", wrong)]
        listed = "; ".join(f"{_listing(names)} {fault}" for fault, names in faults if names)
        if listed:
            raise CheckpointError(f"{self.path}: tensors do not match the {self.config.architecture} config: {listed}")

    def _may_remain(self, name: str) -> bool:
        return name.startswith(_MEDUSA_PREFIXES) or name.endswith("rotary_emb.inv_freq")


def open_checkpoint(model: str | os.PathLike[str]) -> Checkpoint:
    """Opens a model.

    Args:
        model: "default" (fetched when it is not in the cache), a folder with config.json and safetensors or PyTorch
            weights, sharded or not, a .gguf file, or a hub id "org/name".

    Raises:
        CheckpointError: one line that names the file and the remedy. HeadsOnlyError for a folder of Medusa heads.
        ModelFetchError: if the default model cannot be fetched.
    """
    if model == "default":
        from .default_model import default_model_path

        return _open_folder(default_model_path())
    path = Path(fetched(model)).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        if path.suffix == ".gguf" or _starts_with(path, b"GGUF"):
            return _open_gguf(path)
        raise CheckpointError(f"{path}: not a model; pass its folder, a .gguf file, a hub id or 'default'")
    raise CheckpointError(f"{path}: no such file or folder, and not a hub id of the form org/name")


def fetched(model: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The folder of a hub id's files, from the hub or its local cache; whatever is no hub id as it is.

    Raises:
        CheckpointError: the hub does not give it.
    """
    name = os.fspath(model)
    if name.endswith(".gguf") or not is_hub_id(name) or Path(name).exists():
        return model
    return hub_folder(name)


def _open_gguf(path: Path) -> Checkpoint:
    file = GgufFile(path)
    try:
        weights = GgufWeights(file)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return Checkpoint(path, weights.config, weights, file)


def _open_folder(folder: Path) -> Checkpoint:
    shards = _find_weights(folder)
    config_file = folder / "config.json"
    config = read_json_if_any(config_file)
    _refuse_heads(folder, config, has_weights=bool(shards))
    if not config_file.is_file():
        if ggufs := sorted(folder.glob("*.gguf")):
            raise CheckpointError(f"{folder}: no config.json; to use the GGUF file in it pass {ggufs[0]}")
        raise CheckpointError(
            f"{folder}: no config.json; pass the folder that holds the model's config.json and weights"
        )
    try:
        parsed = ModelConfig.from_hf(config, read_json_if_any(folder / "generation_config.json"))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{config_file}: {error}") from None
    if not shards:
        raise CheckpointError(
            f"{folder}: no weights; expected model.safetensors, pytorch_model.bin or a sharded one with its index"
        )
    binary = shards[0].suffix == ".bin"
    return Checkpoint(folder, parsed, _TorchFiles(shards) if binary else _SafetensorsFiles(shards))


def _refuse_heads(folder: Path, config: dict[str, Any], *, has_weights: bool) -> None:
    """Medusa heads come with a config.json of their own, without the model's shape or under model_type "medusa"."""
    keys = {"medusa_num_heads", "num_medusa_heads", "base_model_name_or_path"} & config.keys()
    heads_file = any(folder.glob("medusa_lm_head.*"))
    whole_model = has_weights and config.get("model_type") not in (None, "medusa")
    if whole_model or not (keys or heads_file or config.get("model_type") == "medusa"):
        return
    base = config.get("base_model_name_or_path")
    remedy = f"pass model={base!r} and these as heads" if base else "pass the base model, and these as heads"
    named = f"its base_model_name_or_path is {base!r}" if base else "its config.json names no base model"
    raise HeadsOnlyError(f"{folder}: holds only Medusa heads, no base model; {named}; {remedy}", base)


def _find_weights(folder: Path) -> list[Path]:
    """The weight files of a folder, safetensors before PyTorch's; [] if it has none."""
    for whole in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        index = whole.with_name(f"{whole.name}.index.json")
        if whole.is_file():
            return [whole]
        if index.is_file():
            return _read_index(index)
    return []


def _read_index(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index}: no usable weight_map; download the checkpoint again")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent}: missing {_listing(missing)} of {len(names)} shards; download them again"
        )
    return [index.parent / name for name in names]


class _SafetensorsFiles:
    """Tensors of safetensors files, each mapped into memory when it is first asked for."""

    def __init__(self, files: list[Path]):
        from safetensors import SafetensorError, safe_open

        self._file_of: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                if _starts_with(file, b"version https://git-lfs"):
                    raise CheckpointError(f"{file}: a Git LFS pointer, not the weights; run `git lfs pull`") from None
                raise CheckpointError(f"{file}: truncated or damaged ({error}); download it again") from None
            self._file_of.update(dict.fromkeys(handle.keys(), handle))

    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)


class _TorchFiles:
    """Tensors of `torch.save` files, loaded without running any code they may hold."""

    def __init__(self, files: list[Path]):
        import torch

        self._tensors: dict[str, Tensor] = {}
        for file in files:
            try:
                # Only the zip format can be memory-mapped; files older than PyTorch 1.6 are read whole.
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            except Exception as error:  # torch.load raises whatever its unpickler met
                raise CheckpointError(
                    f"{file}: truncated, damaged or not plain tensors ({first_line(error)}); "
                    "download it again or use safetensors"
                ) from None
            if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
                raise CheckpointError(f"{file}: not a state dict of tensors")
            self._tensors.update(loaded)

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def _starts_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def _listing(names: list[str]) -> str:
    """At most `_SHOWN` names and how many there are: '2: a, b'."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} ({', '.join(names[:_SHOWN])}{more})"
