"""Medusa heads: one strict loader for every checkpoint dialect, and the writer of our own.

A head reads the hidden state after the base's final norm: `layers` times x + silu(W x + b), then an LM head. The
dialects differ in their tensors' names only, so each is one row of `_DIALECTS`; what must be there is said once.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

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
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_PATTERNS = ["*.json", "*.safetensors", "medusa_lm_head.pt", "pytorch_model*.bin"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PREFIX = re.compile(r"^medusa_heads?\.")
_SHARED_LM_HEAD = "lm_head.weight"
_TOKEN_MAP = "token_map"
_SHAPE_KEYS = frozenset(
    {
        "base_model_name_or_path",
        "medusa_num_heads",
        "medusa_num_layers",
        "hidden_size",
        "truncated_vocab_size",
        "version",
    }
)


class HeadsError(ValueError):
    """A heads checkpoint that cannot be used. The message is one line that names the file or tensor and its fault."""


@dataclass(frozen=True, eq=False)
class MedusaHeads:
    """The heads' weights, stacked as `medusa_kernels.draft_heads` takes them. HeadsError for shapes that disagree.

    Attributes:
        block_weight: (heads, layers, hidden, hidden) float. `layers` may be 0 for heads with an LM head each.
        block_bias: (heads, layers, hidden) float, or None.
        lm_head_weight: (heads, draft_vocab, hidden) one LM head each; (draft_vocab, hidden) one for all heads; None:
            the base model's, or where there is a `token_map` the base's rows `token_map`.
        token_map: int32 (draft_vocab,), draft id -> base id, or None: they are the same.
        base_model_name_or_path: what the heads were trained for, as their config.json says it.
        metadata: what else config.json says of the heads, above all `accuracy`.
    """

    block_weight: Tensor
    block_bias: Tensor | None = None
    lm_head_weight: Tensor | None = None
    token_map: Tensor | None = None
    base_model_name_or_path: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(self.block_weight.shape)
        if len(shape) != 4 or shape[2] != shape[3] or not shape[0] or not shape[3]:
            raise HeadsError(f"block_weight has shape {shape}; it must be (heads, layers, hidden, hidden)")
        if self.block_bias is not None and tuple(self.block_bias.shape) != shape[:3]:
            raise HeadsError(f"block_bias has shape {tuple(self.block_bias.shape)}; it must be {shape[:3]}")
        if self.token_map is not None and (self.token_map.dtype != torch.int32 or self.token_map.ndim != 1):
            found = f"{self.token_map.dtype} {tuple(self.token_map.shape)}"
            raise HeadsError(f"token_map is {found}; it must be int32 (draft_vocab,)")
        if self.lm_head_weight is not None:
            found = tuple(self.lm_head_weight.shape)
            rows = self.draft_vocab_size
            if found not in ((shape[0], rows, shape[3]), (rows, shape[3])):
                wanted = f"({shape[0]} heads, {rows}, {shape[3]}) or ({rows}, {shape[3]})"
                raise HeadsError(f"lm_head_weight has shape {found}; it must be {wanted}")
        if not shape[1] and (self.lm_head_weight is None or self.lm_head_weight.ndim != 3):
            raise HeadsError("0 layers need an LM head for each head; a shared one would only repeat the base's token")
        _check_accuracy(self.accuracy, self.num_heads)

    @property
    def num_heads(self) -> int:
        return self.block_weight.shape[0]

    @property
    def num_layers(self) -> int:
        return self.block_weight.shape[1]

    @property
    def hidden_size(self) -> int:
        return self.block_weight.shape[3]

    @property
    def draft_vocab_size(self) -> int | None:
        """How many tokens the heads choose among; None: all of the base model's."""
        if self.token_map is not None:
            return len(self.token_map)
        return None if self.lm_head_weight is None or self.lm_head_weight.ndim < 2 else self.lm_head_weight.shape[-2]

    @property
    def accuracy(self) -> list[list[float]] | None:
        """`accuracy[head][rank]` as `Tree.search` takes it, if config.json holds a measurement."""
        return self.metadata.get("accuracy")


class _Dialect(NamedTuple):
    """Names of a head's tensors behind `medusa_head.` or `medusa_heads.`; {l} in an LM head's is the layer count."""

    name: str
    block: str
    lm_head: str


_DIALECTS = (
    _Dialect("Medusa", "{h}.{l}.linear.{kind}", "{h}.{l}.weight"),  # Medusa-1, v2, Medusa-2, ModelOpt
    _Dialect("TensorRT-LLM", "{h}.medusa_layers.{l}.linear.{kind}", "{h}.lm_head.weight"),
    _Dialect("vLLM", "blocks.{h}.layers.{l}.{kind}", "lm_heads.{h}.weight"),
)


class _Layout(NamedTuple):
    """A dialect with the number of heads and layers: the names of all tensors, head by head, layer by layer."""

    dialect: _Dialect
    num_heads: int
    num_layers: int
    prefix: str = ""  # stands before the names in the file; messages say it

    def blocks(self, kind: str) -> list[str]:
        pairs = itertools.product(range(self.num_heads), range(self.num_layers))
        return [self.dialect.block.format(h=h, l=layer, kind=kind) for h, layer in pairs]

    def lm_heads(self) -> list[str]:
        return [self.dialect.lm_head.format(h=h, l=self.num_layers) for h in range(self.num_heads)]


def load_heads(
    path: str | os.PathLike, *, hidden_size: int | None = None, vocab_size: int | None = None
) -> MedusaHeads:
    """Load heads from a folder, a .safetensors, .pt or .bin file, or a Hugging Face hub id.

    Of a folder it reads `medusa_lm_head.safetensors` or `.pt`, else the model's own files, where a Medusa-2
    checkpoint's base tensors stay unread. config.json beside the weights is optional. `.pt` and `.bin` are read by
    `torch.load(weights_only=True)`. For `hidden_size`, `vocab_size` and what raises HeadsError see
    `heads_from_tensors`; here also a path or hub id that leads nowhere, and an empty, damaged or unsafe file.
    """
    place = Path(path)
    if not place.exists():
        if not _HUB_ID.fullmatch(os.fspath(path)):
            raise HeadsError(f"no heads at {place}: no such file or folder")
        place = _fetch_from_hub(os.fspath(path))
    files = _weight_files(place) if place.is_dir() else [place]
    names = {file: _tensor_names(file) for file in files}
    try:
        wanted = set(_own_names(itertools.chain.from_iterable(names.values())).values())
    except HeadsError as error:
        raise HeadsError(f"heads in {place}: {error}") from None
    tensors = {name: t for file in files for name, t in _read(file, wanted.intersection(names[file])).items()}
    config = _read_config(place if place.is_dir() else place.parent)
    return heads_from_tensors(tensors, config, source=str(place), hidden_size=hidden_size, vocab_size=vocab_size)


def heads_from_tensors(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    source: str,
    hidden_size: int | None = None,
    vocab_size: int | None = None,
) -> MedusaHeads:
    """Heads from named tensors of any dialect: Medusa-1, v2, Medusa-2, TensorRT-LLM, ModelOpt or vLLM, told by names.

    Beside a base model's tensors (names under `model.`), those and its LM head are passed over; every other tensor is
    used. The tensors, not `config`, decide the number of heads and layers. `hidden_size` and `vocab_size` are the base
    model's, to check against; they default to those in `config`. As in vLLM, an LM head of the whole vocabulary beside
    a `token_map` is cut to the map's rows, and with `original_lm_head` in `config` head 0's LM head serves all.

    Raises HeadsError, naming `source` and the tensor, for: no heads; a missing, left-over or misshapen tensor; a dtype
    that is not float32, bfloat16 or float16, or not that of the tensors it is stacked with; NaN or infinity; a
    `token_map` that is missing, not integer, or holds ids that repeat or lie outside the vocabulary.
    """
    try:
        names = _own_names(tensors)
        layout, own = _understand({short: tensors[name] for short, name in names.items()}, config)
        prefixes = Counter(name.removesuffix(short) for short, name in names.items())
        layout = layout._replace(prefix=prefixes.most_common(1)[0][0])
        _check_names_and_shapes(layout, own, config, hidden_size or _positive_int(config.get("hidden_size")))
        vocab_size = vocab_size or _positive_int(config.get("vocab_size"))
        token_map = _check_token_map(own.get(_TOKEN_MAP), config, vocab_size)
        lm_head = _stack(layout, layout.lm_heads(), own)
        if lm_head is None:
            lm_head = own.get(_SHARED_LM_HEAD)
        if lm_head is not None:
            lm_head = _draft_rows(lm_head, token_map, vocab_size)
        weight = _stack(layout, layout.blocks("weight"), own)
        bias = _stack(layout, layout.blocks("bias"), own)
        counts = layout.num_heads, layout.num_layers
        hidden = weight.shape[-1] if weight is not None else lm_head.shape[-1]
        return MedusaHeads(
            block_weight=lm_head.new_empty(*counts, hidden, hidden) if weight is None else weight.unflatten(0, counts),
            block_bias=None if bias is None else bias.unflatten(0, counts),
            lm_head_weight=lm_head,
            token_map=token_map,
            base_model_name_or_path=_base_name(config),
            metadata=_metadata(config),
        )
    except HeadsError as error:
        raise HeadsError(f"heads in {source}: {error}") from None


def save_heads(
    folder: str | os.PathLike,
    heads: MedusaHeads,
    config_extra: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write `medusa_lm_head.safetensors` (Medusa v2 names, rounded to `dtype`) and config.json into `folder`.

    One LM head for all heads is stored as `lm_head.weight`, a draft vocabulary as `token_map`: our additions to v2.
    config.json gets the shape, `heads.metadata` and `config_extra`, the latter winning. Each file is replaced
    atomically, the weights first, so no reader sees half a file. Raises HeadsError if `config_extra` has a key that
    the heads themselves decide.
    """
    if clash := _SHAPE_KEYS.intersection(config_extra or {}):
        raise HeadsError(f"config_extra has {_some(sorted(clash))}, which the heads themselves decide")
    layout = _Layout(_DIALECTS[0], heads.num_heads, heads.num_layers)
    tensors = dict(zip(layout.blocks("weight"), heads.block_weight.flatten(0, 1), strict=True))
    if heads.block_bias is not None:
        tensors |= zip(layout.blocks("bias"), heads.block_bias.flatten(0, 1), strict=True)
    if heads.lm_head_weight is not None and heads.lm_head_weight.ndim == 3:
        tensors |= zip(layout.lm_heads(), heads.lm_head_weight, strict=True)
    elif heads.lm_head_weight is not None:
        tensors[_SHARED_LM_HEAD] = heads.lm_head_weight
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    config = {
        "base_model_name_or_path": heads.base_model_name_or_path,
        "medusa_num_heads": heads.num_heads,
        "medusa_num_layers": heads.num_layers,
        "hidden_size": heads.hidden_size,
        "version": "2",
    }
    if heads.token_map is not None:
        tensors[_TOKEN_MAP] = heads.token_map.detach().cpu().contiguous()
        config["truncated_vocab_size"] = len(heads.token_map)
    text = json.dumps({**config, **heads.metadata, **(config_extra or {}), **config}, indent=2) + "\n"
    Path(folder).mkdir(parents=True, exist_ok=True)
    _replace(Path(folder) / HEADS_FILE, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    _replace(Path(folder) / "config.json", lambda file: file.write_text(text, encoding="utf-8"))


def contains_heads(names: Iterable[str]) -> bool:
    """Whether a checkpoint with tensors of these names holds Medusa heads, alone or inside a full model (Medusa-2)."""
    return any(_parse(dialect, short) for short in _own_names(names) for dialect in _DIALECTS)


def is_heads_only(folder: str | os.PathLike) -> bool:
    """Whether `folder` holds Medusa heads and no base model. Reads names only; False for what is no folder."""
    place = Path(folder)
    if not place.is_dir() or any(place.glob("*.gguf")):
        return False
    names = [name for file in _model_files(place) for name in _tensor_names(file)]
    if any(name.startswith("model.") for name in names):
        return False
    return any((place / name).exists() for name in _HEADS_FILES) or contains_heads(names)


def base_model_of(folder: str | os.PathLike) -> str | None:
    """The `base_model_name_or_path` in the folder's config.json, if any. Raises HeadsError for a broken config."""
    return _base_name(_read_config(Path(folder)))


def _own_names(names: Iterable[str]) -> dict[str, str]:
    """{name without prefix: name} of the tensors that are not a base model's."""
    names = list(names)
    has_base = any(name.startswith("model.") for name in names)
    own: dict[str, str] = {}
    for name in names:
        if has_base and name.startswith(("model.", "lm_head.")):
            continue
        short = _PREFIX.sub("", name)
        if short in own:
            raise HeadsError(f"{own[short]!r} and {name!r} are one and the same tensor of a head, there twice")
        own[short] = name
    return own


@cache
def _pattern(template: str) -> re.Pattern[str]:
    number = "0|[1-9][0-9]{0,2}"
    groups = {"h": number, "l": number, "kind": "weight|bias"}
    named = {name: f"(?P<{name}>{pattern})" for name, pattern in groups.items()}
    return re.compile(template.replace(".", r"\.").format(**named))


def _parse(dialect: _Dialect, name: str) -> tuple[str, dict[str, str]] | None:
    """("block" or "lm_head", the fields in the name) if the name is of this dialect."""
    for role in ("block", "lm_head"):
        if match := _pattern(getattr(dialect, role)).fullmatch(name):
            return role, match.groupdict()
    return None


def _understand(own: dict[str, Tensor], config: Mapping[str, Any]) -> tuple[_Layout, dict[str, Tensor]]:
    """The layout that the names speak of, and the tensors with vLLM's `original_lm_head` resolved."""
    dialect = max(_DIALECTS, key=lambda candidate: sum(_parse(candidate, name) is not None for name in own))
    if (
        dialect.name == "vLLM"
        and config.get("original_lm_head")
        and (shared := own.get("lm_heads.0.weight")) is not None
    ):
        for name in [name for name in own if name.startswith("lm_heads.")]:
            if not torch.equal(own[name], shared):
                raise HeadsError(f"{name!r} differs from 'lm_heads.0.weight', but config.json has original_lm_head")
        own = {name: tensor for name, tensor in own.items() if not name.startswith("lm_heads.")}
        own[_SHARED_LM_HEAD] = shared
    parsed = [found for name in own if (found := _parse(dialect, name))]
    if not parsed:
        raise HeadsError(f"no tensor is named as a head's{f'; found {_some(list(own))}' if own else ''}")
    block_layers = [int(fields["l"]) + 1 for role, fields in parsed if role == "block"]
    # A Medusa LM head's own index counts the layers only where there is no block to count.
    num_layers = max(block_layers or [int(fields.get("l", 0)) for _, fields in parsed])
    return _Layout(dialect, max(int(fields["h"]) for _, fields in parsed) + 1, num_layers), own


def _check_names_and_shapes(
    layout: _Layout, own: Mapping[str, Tensor], config: Mapping[str, Any], hidden: int | None
) -> None:
    """Every tensor that such a checkpoint must have is there, none besides, each of its shape, a float and finite."""
    hidden = hidden or _usual_size(own.values(), -1)
    lm_heads = [own[name] for name in layout.lm_heads() if name in own]
    has_bias = any(name in own for name in layout.blocks("bias"))
    has_bias |= layout.dialect.name == "vLLM" and bool(config.get("medusa_fc_bias"))
    shapes = dict.fromkeys(layout.blocks("weight"), (hidden, hidden))
    shapes |= dict.fromkeys(layout.blocks("bias") if has_bias else (), (hidden,))
    shapes |= dict.fromkeys(layout.lm_heads() if lm_heads else (), (_usual_size(lm_heads, 0), hidden))
    if _SHARED_LM_HEAD in own and not lm_heads:
        shapes[_SHARED_LM_HEAD] = (_usual_size([own[_SHARED_LM_HEAD]], 0), hidden)
    missing = [f"{layout.prefix + name!r} {shape}" for name, shape in shapes.items() if name not in own]
    extra = [
        f"{layout.prefix + name!r} {tuple(own[name].shape)}"
        for name in own
        if name not in shapes and name != _TOKEN_MAP
    ]
    if missing or extra:
        parts = [f"{what} {_some(which)}" for what, which in (("missing", missing), ("left over", extra)) if which]
        raise HeadsError(f"{'; '.join(parts)} (read as {layout.dialect.name} names)")
    for name, shape in shapes.items():
        if tuple(own[name].shape) != shape:
            raise HeadsError(f"{layout.prefix + name!r} has shape {tuple(own[name].shape)}; it must be {shape}")
        if own[name].dtype not in _DTYPES:
            raise HeadsError(f"{layout.prefix + name!r} is {own[name].dtype}; it must be float32, bfloat16 or float16")
        # aminmax passes NaN on, and needs no mask as large as the tensor as isfinite does
        if own[name].numel() and not all(torch.isfinite(end) for end in torch.aminmax(own[name])):
            raise HeadsError(f"{layout.prefix + name!r} holds NaN or infinity")


def _check_token_map(token_map: Tensor | None, config: Mapping[str, Any], vocab_size: int | None) -> Tensor | None:
    if token_map is None:
        truncated = _positive_int(config.get("truncated_vocab_size"))
        if truncated and vocab_size and truncated < vocab_size:
            raise HeadsError(
                f"'token_map' is missing; config.json truncates the vocabulary to {truncated} of {vocab_size}"
            )
        return None
    if token_map.dtype not in (torch.int32, torch.int64) or token_map.ndim != 1 or not len(token_map):
        found = f"{token_map.dtype} {tuple(token_map.shape)}"
        raise HeadsError(f"'token_map' is {found}; it must be int32 or int64 (draft_vocab,) with at least one id")
    low, high, end = token_map.min().item(), token_map.max().item(), vocab_size or 2**31
    if low < 0 or high >= end:
        raise HeadsError(f"'token_map' holds id {low if low < 0 else high}; ids must be in 0..{end - 1}")
    values, counts = token_map.unique(return_counts=True)
    if len(values) < len(token_map):
        raise HeadsError(f"'token_map' holds id {values[counts > 1][0].item()} more than once; ids must be unique")
    return token_map.to(torch.int32)


def _draft_rows(lm_head: Tensor, token_map: Tensor | None, vocab_size: int | None) -> Tensor:
    """The LM head(s) (..., rows, hidden) with one row per draft token."""
    rows = lm_head.shape[-2]
    if token_map is None:
        if vocab_size and rows != vocab_size:
            raise HeadsError(
                f"the LM head has {rows} rows; without a token_map it must have the vocabulary's {vocab_size}"
            )
        return lm_head
    if rows == len(token_map):
        return lm_head
    if rows != (vocab_size or rows) or rows <= token_map.max():
        whole = f" or the vocabulary's {vocab_size}" if vocab_size else ""
        raise HeadsError(f"the LM head has {rows} rows; it must have the token_map's {len(token_map)}{whole}")
    return lm_head.index_select(-2, token_map)


def _stack(layout: _Layout, names: list[str], own: Mapping[str, Tensor]) -> Tensor | None:
    """The tensors of these names in one (len(names), ...), or None where the checkpoint has none of them."""
    if not names or names[0] not in own:
        return None
    first = own[names[0]].dtype
    for name in names:
        if own[name].dtype != first:
            found = f"{layout.prefix + name!r} is {own[name].dtype}"
            raise HeadsError(f"{found}; it must be {first} like {layout.prefix + names[0]!r}")
    return torch.stack([own[name] for name in names])


def _check_accuracy(accuracy: Any, num_heads: int) -> None:
    def is_row(row: Any) -> bool:
        return isinstance(row, list) and all(isinstance(p, float | int) and 0 <= p <= 1 for p in row)

    if accuracy is not None and not (
        isinstance(accuracy, list) and len(accuracy) <= num_heads and all(map(is_row, accuracy))
    ):
        raise HeadsError(f"accuracy is {accuracy!r:.60}; it must be at most {num_heads} lists of probabilities")


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the heads beyond their shape. One with a model_type is a model's: its accuracy alone."""
    names = {"accuracy"} if config.get("model_type") else set(config) - _SHAPE_KEYS
    return {name: value for name, value in config.items() if name in names}


def _base_name(config: Mapping[str, Any]) -> str | None:
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _positive_int(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _usual_size(tensors: Iterable[Tensor], dim: int) -> int:
    """The commonest size along `dim`: one misshapen tensor then does not set the measure for the others."""
    sizes = Counter(tensor.shape[dim] for tensor in tensors if tensor.ndim)
    return sizes.most_common(1)[0][0] if sizes else 0


def _read_config(folder: Path) -> dict[str, Any]:
    return _read_json(folder / "config.json") if (folder / "config.json").exists() else {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HeadsError(f"cannot read {file}: no valid JSON ({_first_line(error)})") from error
    if not isinstance(content, dict):
        raise HeadsError(f"cannot read {file}: it holds a JSON {type(content).__name__} and must hold an object")
    return content


def _weight_files(folder: Path) -> list[Path]:
    """The files to look for heads in."""
    heads_files = [folder / name for name in _HEADS_FILES if (folder / name).exists()][:1]
    if files := heads_files or _model_files(folder):
        return files
    raise HeadsError(f"no heads in {folder}: it has neither {' nor '.join(_HEADS_FILES)} nor a model's weights")


def _model_files(folder: Path) -> list[Path]:
    """The folder's weight files other than `_HEADS_FILES`; a sharded checkpoint's as its index lists them."""
    if found := [folder / name for name in _MODEL_FILES if (folder / name).exists()][:1]:
        if found[0].suffix != ".json":
            return found
        shards = _read_json(found[0]).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise HeadsError(f"cannot read {found[0]}: it has no weight_map from tensor names to files")
        return [folder / shard for shard in sorted(set(shards.values()))]
    for pattern in _MODEL_GLOBS:
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
        reason = _first_line(error) if file.suffix == ".safetensors" else "torch.load(weights_only=True) refuses it"
        raise HeadsError(f"cannot read {file}: damaged, or more inside than tensors ({reason})") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise HeadsError(f"cannot read {file}: it must hold one dict from names to tensors")
    return dict.fromkeys(content) if wanted is None else {name: content[name] for name in wanted}


def _fetch_from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except Exception as error:  # offline, unknown, private: the user needs one line, not the client's own types
        raise HeadsError(
            f"no heads at {name!r}: no such file or folder, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {_first_line(error)}); without a network, pass a local folder or file"
        ) from error


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    """Write beside `file`, then rename over it."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _some(items: list[str]) -> str:
    return ", ".join(items) if len(items) <= 4 else f"{', '.join(items[:4])} and {len(items) - 4} more"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]
