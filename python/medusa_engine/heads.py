"""Medusa heads, and one strict reading of every checkpoint dialect; heads_files.py finds the files.

A head reads the hidden state after the base's final norm: `layers` times x + silu(W x + b), then an LM head. Ours may
also be told the root, the token that the base chose from that hidden state (`MedusaHeads.root_weight`). The dialects
differ in their tensors' names only, so each is one row of `DIALECTS`; what must be there is said once.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PREFIX = re.compile(r"^medusa_heads?\.")
SHARED_LM_HEAD = "lm_head.weight"
TOKEN_MAP = "token_map"
ROOT = "root.weight"
ROOT_EPS = 1e-6  # of the norm of the root's embedding
MEASURED = frozenset({"accuracy", "paths", "temperatures"})
SHAPE_KEYS = frozenset(
    {
        "base_model_name_or_path",
        "medusa_num_heads",
        "medusa_num_layers",
        "hidden_size",
        "truncated_vocab_size",
        "medusa_fc_bias",
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
        root_weight: (hidden, hidden) float, or None. With it the heads read
            hidden + root_weight @ rms_norm(embedding of the root), where they otherwise read hidden alone.
        base_model_name_or_path: what the heads were trained for, as their config.json says it.
        metadata: what else config.json says of the heads, above all `accuracy`.
    """

    block_weight: Tensor
    block_bias: Tensor | None = None
    lm_head_weight: Tensor | None = None
    token_map: Tensor | None = None
    root_weight: Tensor | None = None
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
        if self.root_weight is not None and tuple(self.root_weight.shape) != shape[2:]:
            raise HeadsError(f"root_weight has shape {tuple(self.root_weight.shape)}; it must be {shape[2:]}")
        if not shape[1] and (self.lm_head_weight is None or self.lm_head_weight.ndim != 3):
            raise HeadsError("0 layers need an LM head for each head; a shared one would only repeat the base's token")
        _check_accuracy(self.accuracy, self.num_heads)
        _check_paths(self.paths, self.num_heads)
        _check_temperatures(self.metadata.get("temperatures"), self.num_heads)

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

    @property
    def paths(self) -> list[list[int]] | None:
        """Paths by falling worth, if config.json lists them: the first n - 1 are the best static tree of n nodes."""
        return self.metadata.get("paths")


class _Dialect(NamedTuple):
    """Names of a head's tensors behind `medusa_head.` or `medusa_heads.`; {l} in an LM head's is the layer count."""

    name: str
    block: str
    lm_head: str


DIALECTS = (
    _Dialect("Medusa", "{h}.{l}.linear.{kind}", "{h}.{l}.weight"),  # Medusa-1, v2, Medusa-2, ModelOpt
    _Dialect("TensorRT-LLM", "{h}.medusa_layers.{l}.linear.{kind}", "{h}.lm_head.weight"),
    _Dialect("vLLM", "blocks.{h}.layers.{l}.{kind}", "lm_heads.{h}.weight"),
)


class Layout(NamedTuple):
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
        names = own_names(tensors)
        layout, own = _understand({short: tensors[name] for short, name in names.items()}, config)
        prefixes = Counter(name.removesuffix(short) for short, name in names.items())
        layout = layout._replace(prefix=prefixes.most_common(1)[0][0])
        _check_names_and_shapes(layout, own, config, hidden_size or _positive_int(config.get("hidden_size")))
        vocab_size = vocab_size or _positive_int(config.get("vocab_size"))
        token_map = _check_token_map(own.get(TOKEN_MAP), config, vocab_size)
        lm_head = _stack(layout, layout.lm_heads(), own)
        if lm_head is None:
            lm_head = own.get(SHARED_LM_HEAD)
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
            root_weight=own.get(ROOT),
            base_model_name_or_path=base_name(config),
            metadata=_metadata(config),
        )
    except HeadsError as error:
        raise HeadsError(f"heads in {source}: {error}") from None


def contains_heads(names: Iterable[str]) -> bool:
    """Whether a checkpoint with tensors of these names holds Medusa heads, alone or inside a full model (Medusa-2)."""
    return any(_parse(dialect, short) for short in own_names(names) for dialect in DIALECTS)


def own_names(names: Iterable[str]) -> dict[str, str]:
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


def _understand(own: dict[str, Tensor], config: Mapping[str, Any]) -> tuple[Layout, dict[str, Tensor]]:
    """The layout that the names speak of, and the tensors with vLLM's `original_lm_head` resolved."""
    dialect = max(DIALECTS, key=lambda candidate: sum(_parse(candidate, name) is not None for name in own))
    if (
        dialect.name == "vLLM"
        and config.get("original_lm_head")
        and (shared := own.get("lm_heads.0.weight")) is not None
    ):
        for name in [name for name in own if name.startswith("lm_heads.")]:
            if not torch.equal(own[name], shared):
                raise HeadsError(f"{name!r} differs from 'lm_heads.0.weight', but config.json has original_lm_head")
        own = {name: tensor for name, tensor in own.items() if not name.startswith("lm_heads.")}
        own[SHARED_LM_HEAD] = shared
    parsed = [found for name in own if (found := _parse(dialect, name))]
    if not parsed:
        raise HeadsError(f"no tensor is named as a head's{f'; found {some(list(own))}' if own else ''}")
    block_layers = [int(fields["l"]) + 1 for role, fields in parsed if role == "block"]
    # A Medusa LM head's own index counts the layers only where there is no block to count.
    num_layers = max(block_layers or [int(fields.get("l", 0)) for _, fields in parsed])
    return Layout(dialect, max(int(fields["h"]) for _, fields in parsed) + 1, num_layers), own


def _check_names_and_shapes(
    layout: Layout, own: Mapping[str, Tensor], config: Mapping[str, Any], hidden: int | None
) -> None:
    """Every tensor that such a checkpoint must have is there, none besides, each of its shape, a float and finite."""
    hidden = hidden or _usual_size(own.values(), -1)
    lm_heads = [own[name] for name in layout.lm_heads() if name in own]
    # Only vLLM's blocks have none unless told so; ours say it where they have none.
    expects_bias = config.get("medusa_fc_bias", layout.dialect.name != "vLLM")
    has_bias = bool(expects_bias) or any(name in own for name in layout.blocks("bias"))
    shapes = dict.fromkeys(layout.blocks("weight"), (hidden, hidden))
    shapes |= dict.fromkeys(layout.blocks("bias") if has_bias else (), (hidden,))
    shapes |= dict.fromkeys(layout.lm_heads() if lm_heads else (), (_usual_size(lm_heads, 0), hidden))
    if SHARED_LM_HEAD in own and not lm_heads:
        shapes[SHARED_LM_HEAD] = (_usual_size([own[SHARED_LM_HEAD]], 0), hidden)
    if ROOT in own:
        shapes[ROOT] = (hidden, hidden)
    missing = [f"{layout.prefix + name!r} {shape}" for name, shape in shapes.items() if name not in own]
    extra = [
        f"{layout.prefix + name!r} {tuple(own[name].shape)}" for name in own if name not in shapes and name != TOKEN_MAP
    ]
    if missing or extra:
        parts = [f"{what} {some(which)}" for what, which in (("missing", missing), ("left over", extra)) if which]
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


def _stack(layout: Layout, names: list[str], own: Mapping[str, Tensor]) -> Tensor | None:
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


def _check_paths(paths: Any, num_heads: int) -> None:
    if paths is None:
        return
    seen: set[tuple[int, ...]] = {()}
    for path in paths if isinstance(paths, list) else [paths]:
        if not (isinstance(path, list) and path and all(type(rank) is int and rank >= 0 for rank in path)):
            raise HeadsError(f"paths holds {path!r:.60}; each path must be a list of ranks, 0 or higher")
        if len(path) > num_heads:
            raise HeadsError(f"paths holds {path}; {num_heads} heads fill paths of at most {num_heads} ranks")
        if tuple(path[:-1]) not in seen or tuple(path) in seen:
            fault = "twice" if tuple(path) in seen else f"before its parent {path[:-1]}"
            raise HeadsError(f"paths holds {path} {fault}")
        seen.add(tuple(path))


def _check_temperatures(temperatures: Any, num_heads: int) -> None:
    if temperatures is not None and not (
        isinstance(temperatures, list)
        and len(temperatures) == num_heads
        and all(isinstance(t, float | int) and 0 < t < math.inf for t in temperatures)
    ):
        raise HeadsError(f"temperatures is {temperatures!r:.60}; it must be {num_heads} numbers above 0, one per head")


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the heads beyond their shape. One with a model_type is a model's: our own keys alone."""
    names = MEASURED if config.get("model_type") else set(config) - SHAPE_KEYS
    return {name: value for name, value in config.items() if name in names}


def base_name(config: Mapping[str, Any]) -> str | None:
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _positive_int(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _usual_size(tensors: Iterable[Tensor], dim: int) -> int:
    """The commonest size along `dim`: one misshapen tensor then does not set the measure for the others."""
    sizes = Counter(tensor.shape[dim] for tensor in tensors if tensor.ndim)
    return sizes.most_common(1)[0][0] if sizes else 0


def some(items: list[str]) -> str:
    return ", ".join(items) if len(items) <= 4 else f"{', '.join(items[:4])} and {len(items) - 4} more"
