"""What `medusa calibrate` measured, as a file in the cache: one per machine, backend, dtype, base model and heads."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from medusa_kernels import Tree

from . import machine
from .default_model import cache_root
from .draft import MedusaDrafter
from .files import write_json
from .model import Model

_VERSION = 1
_names: WeakKeyDictionary[MedusaDrafter, str] = WeakKeyDictionary()


@dataclass(frozen=True)
class Curve:
    """What a step costs at one batch size.

    Attributes:
        context: committed rows of every sequence while it was measured.
        rounds: samples behind every median.
        spread: the widest middle half of any median's samples, as a share of it: how noisy the machine was.
        step_seconds: {nodes, the root counted: seconds of a whole step}; the root alone, 1, is always there.
    """

    context: int
    rounds: int
    spread: float
    step_seconds: dict[int, float]

    def __post_init__(self) -> None:
        if 1 not in self.step_seconds or not all(n >= 1 and s > 0 for n, s in self.step_seconds.items()):
            raise ValueError(f"step_seconds must be positive and hold node count 1, not {self.step_seconds}")

    def seconds(self, nodes: int) -> float:
        """Of a step with so many nodes; between two measured counts on the line that joins them."""
        counts = sorted(self.step_seconds)
        return float(np.interp(nodes, counts, [self.step_seconds[n] for n in counts]))


@dataclass(frozen=True)
class Calibration:
    """How often the heads are right, what steps cost here, and so the best tree.

    Attributes:
        about: machine, backend, dtype, model; and the text: prompts, its digest, conversations, positions.
        accuracy: [head][rank], as `Tree.search` takes it.
        temperatures: per head; logits divided by it give the text the highest likelihood.
        log_loss: per head, nats of the right token over the draft vocabulary: as it is, and at the temperature.
        paths: best first: the first n - 1 are the best static tree of n nodes.
        tokens_per_step: of those trees of 1, 2, ... nodes, each judged on text that it was not made from.
        curves: by batch size.
    """

    about: dict[str, Any]
    accuracy: list[list[float]]
    temperatures: list[float]
    log_loss: list[list[float]]
    paths: list[list[int]]
    tokens_per_step: list[float]
    curves: dict[int, Curve] = field(default_factory=dict)

    def nodes(self, batch: int) -> int:
        """The size of the tree with the most tokens per second."""
        return best_nodes(self.tokens_per_step, self.curves[batch])

    def tree(self, batch: int) -> Tree | None:
        """The tree with the most tokens per second; None for a batch size that was not measured."""
        return Tree.from_choices(self.paths[: self.nodes(batch) - 1]) if batch in self.curves else None

    def speedup(self, batch: int, nodes: int) -> float:
        """Expected tokens per second with so many nodes over those of plain decoding."""
        curve = self.curves[batch]
        return self.tokens_per_step[nodes - 1] * curve.seconds(1) / curve.seconds(nodes)


def best_nodes(tokens_per_step: Sequence[float], curve: Curve) -> int:
    """The node count n with the most tokens_per_step[n - 1] per second; of equals the smallest."""
    most = min(len(tokens_per_step), max(curve.step_seconds))
    return max(range(1, most + 1), key=lambda n: tokens_per_step[n - 1] / curve.seconds(n))


def locate(model: Model, drafter: MedusaDrafter) -> Path:
    """The file for these heads on this model on this machine, whether it is there or not."""
    if drafter not in _names:
        _names[drafter] = _name(model, drafter)
    where = re.sub(r"[^a-z0-9]+", "-", machine.describe(model.device).lower()).strip("-")
    return cache_root() / "calibrations" / f"{where}-{_names[drafter]}.json"


def find(model: Model, drafter: MedusaDrafter) -> Calibration | None:
    """This machine's calibration of these heads, if there is one; a damaged one is passed over with a warning."""
    if not (cache_root() / "calibrations").is_dir():
        return None
    path = locate(model, drafter)
    if not path.exists():
        return None
    try:
        return read(path)
    except ValueError as error:
        warnings.warn(f"{error}; `medusa calibrate` writes it anew", stacklevel=2)
        return None


def read(path: Path) -> Calibration:
    """Raises ValueError, naming the file, for what is no calibration of this version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("version") != _VERSION:
            raise ValueError(f"its version is not {_VERSION}")
        curves = {
            int(batch): Curve(**{**curve, "step_seconds": {int(n): s for n, s in curve["step_seconds"].items()}})
            for batch, curve in content.pop("curves").items()
        }
        found = Calibration(**content, curves=curves)
        for batch in curves:
            found.tree(batch)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path} is no calibration ({type(error).__name__}: {reason})") from None
    return found


def write(path: Path, calibration: Calibration) -> None:
    write_json(path, {"version": _VERSION, **asdict(calibration)})


def _name(model: Model, drafter: MedusaDrafter) -> str:
    """dtype and a digest. It knows the heads by what they say, since packed weights are opaque: their best guesses
    after a few fixed rows, which also depend on the dtype and the backend's arithmetic.
    """
    rows, top_k = 8, min(8, drafter.vocab_size)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, model.config.hidden_size, generator=generator)
    root = torch.randint(model.config.vocab_size, (rows,), dtype=torch.int32, generator=generator)
    tokens, logprobs, draft = drafter.bind(
        hidden.to(model.device, model.activation_dtype), root.to(model.device), top_k
    )
    draft()
    digest = hashlib.sha256(repr((model.digest, model.backend, model.dtype_name)).encode())
    for tensor in (tokens, logprobs):
        digest.update(tensor.cpu().numpy().tobytes())
    return f"{model.dtype_name}-{digest.hexdigest()[:16]}"
