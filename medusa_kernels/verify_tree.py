"""verify_tree: which path of the tree the base model accepts, and the token it chooses after it."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _check
from ._backends import Lazy, Native, resolve
from ._library import custom_op, traced
from .native import with_workspace
from .native.verify_tree import arguments
from .reference import verify_tree as reference
from .tree import deepest

MODES = ("greedy", "typical", "lossless")
MIN_TEMPERATURE = 1e-5  # below it logits / temperature may overflow fp32

BACKENDS = {
    "reference": reference.launch,
    "cpu": Native("cpu", "verify_tree", arguments),
    "cuda": Native("cuda", "verify_tree", with_workspace("verify_tree", arguments)),
    "triton": Lazy("medusa_kernels.triton.verify_tree"),
}


class Acceptance(NamedTuple):
    """How each sequence accepts, as the kernels read it: (batch,) tensors on the logits' device."""

    mode: Tensor  # int32, index into MODES
    temperature: Tensor  # float32
    top_p: Tensor  # float32
    top_k: Tensor  # int32, 0 = off
    posterior_threshold: Tensor  # float32
    posterior_alpha: Tensor  # float32
    seed: Tensor  # int64
    offset: Tensor  # int64, absolute position of the root


def verify_tree(
    logits: Tensor,
    tree_tokens: Tensor,
    parents: Tensor,
    *,
    mode: str | Sequence[str] = "greedy",
    temperature: float | Sequence[float] | Tensor = 1.0,
    top_p: float | Sequence[float] | Tensor = 1.0,
    top_k: int | Sequence[int] | Tensor = 0,
    posterior_threshold: float | Sequence[float] | Tensor = 0.09,
    posterior_alpha: float | Sequence[float] | Tensor = 0.3,
    seed: int | Sequence[int] | Tensor | None = None,
    offset: Tensor | None = None,
    max_depth: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Judges a whole tree from the base model's logits at its nodes.

    greedy: a child is accepted iff its token is its parent's argmax; the longest path wins.
    typical: iff P[token] > min(posterior_threshold, posterior_alpha · exp(-H)), P = softmax(logits / temperature) at
        the parent and H its entropy (Medusa, section 2.3.1); the longest path wins, then the larger sum of ln P.
    lossless: the target's own token is drawn at each node, and the child that carries it is descended to.
    Remaining ties: the lower node id. The token after a node at depth d is drawn with
    u = Philox4x32-10(key = seed, counter = offset + d + 1) by the inverse CDF over ascending token ids, from P
    truncated by top_k, then top_p. temperature 0 is greedy in every mode.

    Args:
        logits: (batch, n, vocab) fp32, bf16 or fp16; row i is what the base model says after node i.
        tree_tokens: int32 (batch, n), the root's included.
        parents: int32 (n,) or (batch, n), see `Tree.parents`; on the CPU or on the logits' device.
        mode: "greedy", "typical" or "lossless"; it and the numbers below are one for all sequences or one per sequence.
            In a CUDA graph's capture give one for all, or tensors on the logits' device.
        temperature: 0 (greedy) or >= 1e-5.
        top_p: in (0, 1].
        top_k: >= 0; 0 is off.
        posterior_threshold, posterior_alpha: >= 0.
        seed: an int for all sequences, int64 (batch,) or as many ints, or None for fresh entropy.
        offset: int64 (batch,), the absolute position of the root; None is 0.
        max_depth: width of the result less one; None reads it from parents (not inside a CUDA graph).
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        accepted_nodes int32 (batch, max_depth + 1), root first and -1 padded; accept_length int32 (batch,), its nodes
        beyond the root; next_token int32 (batch,). Nothing else is written.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    _check.tensor("logits", logits, shape=(None, None, None), dtype=_check.FLOATS)
    batch = logits.shape[0]
    _check.in_range("logits' batch", batch, 1, 2**31 - 1)
    how = acceptance(
        batch,
        logits.device,
        mode=mode,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        posterior_threshold=posterior_threshold,
        posterior_alpha=posterior_alpha,
        seed=seed,
        offset=offset,
    )
    if torch.compiler.is_compiling():
        check_depth_for_tracing(max_depth)
        return traced("verify_tree", logits, tree_tokens, parents, list(how or ()), max_depth, backend)
    return _checked(logits, tree_tokens, parents, how, max_depth, backend)


def acceptance(
    batch: int,
    device: torch.device,
    *,
    mode: str | Sequence[str] = "greedy",
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    posterior_threshold=0.09,
    posterior_alpha=0.3,
    seed: int | Sequence[int] | Tensor | None = None,
    offset: Tensor | None = None,
) -> Acceptance | None:
    """The arguments of `verify_tree` as checked tensors; None when every sequence is greedy."""
    modes = [mode] * batch if isinstance(mode, str) else mode
    if not isinstance(modes, Sequence):
        raise TypeError(f"mode must be a str or one per sequence, not {type(mode).__name__}")
    if len(modes) != batch:
        raise ValueError(f"mode must be one value or one per sequence ({batch}), not {len(modes)}")
    for value in modes:
        if value not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, not {value!r}")
    f32, i32, i64 = torch.float32, torch.int32, torch.int64
    columns = Acceptance(
        _column("mode", [MODES.index(m) for m in modes], batch, i32),
        _column("temperature", temperature, batch, f32),
        _column("top_p", top_p, batch, f32),
        _column("top_k", top_k, batch, i32),
        _column("posterior_threshold", posterior_threshold, batch, f32),
        _column("posterior_alpha", posterior_alpha, batch, f32),
        _column("seed", _seed(batch, seed), batch, i64),
        _column("offset", 0 if offset is None else offset, batch, i64),
    )
    if all(m == "greedy" for m in modes):
        return None
    return Acceptance(*(_on_device(column, batch, device) for column in columns))


def _column(name: str, value, batch: int, dtype: torch.dtype) -> Tensor:
    """One number as a 0-d tensor, or one per sequence as a (batch,) tensor: checked, where it lies."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit 64 bits, not {value!r:.60}")
    try:
        result = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
        if result.is_floating_point() and result is not value:  # whatever PyTorch's default dtype is
            result = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number or one per sequence, not {value!r:.60}") from None
    kind = "numbers" if dtype.is_floating_point else "integers"
    if result.is_complex() or result.dtype == torch.bool or (result.is_floating_point() and kind == "integers"):
        raise TypeError(f"{name} must hold {kind}, not {value!r:.60}")
    if result.dim() and result.shape != (batch,):
        raise ValueError(f"{name} must be one value or one per sequence ({batch}), not shape {tuple(result.shape)}")
    # While tracing there are no values to look at; the op looks at them when it runs.
    if name in _LIMITS and not torch.compiler.is_compiling() and _check.values_wanted(result.device):
        # Floats as the kernels get them: what fp32 rounds to 0 or infinity is that.
        _check_column(name, (result.to(dtype) if dtype.is_floating_point else result).reshape(-1))
    return result.to(dtype)


def _on_device(column: Tensor, batch: int, device: torch.device) -> Tensor:
    """A column as (batch,) on `device`. Numbers that all sequences share are written there, not copied: a graph capture
    takes no copy from the host's ordinary memory.
    """
    column = column.expand(batch)
    copies = column.is_cpu and device.type != "cpu" and not torch.compiler.is_compiling()
    if copies and bool((column == column[0]).all()):
        return torch.full((batch,), column[0].item(), dtype=column.dtype, device=device)
    return column.to(device).contiguous()


_LIMITS = {
    "temperature": (0, math.inf),
    "top_p": (0, 1),
    "top_k": (0, 2**31 - 1),
    "posterior_threshold": (0, math.inf),
    "posterior_alpha": (0, math.inf),
    "offset": (0, math.inf),
}


def _check_column(name: str, value: Tensor) -> None:
    low, high = _LIMITS[name]
    above = name == "top_p"  # 0 itself would keep nothing
    good = (value > low if above else value >= low) & (value <= high) & value.isfinite()
    if not bool(good.all()):
        limit = "" if high == math.inf else f" and at most {high}"
        found = value[~good][0].item()
        raise ValueError(f"{name} must be finite, {'above' if above else 'at least'} {low}{limit}, not {found}")
    if name == "temperature" and bool(((value > 0) & (value < MIN_TEMPERATURE)).any()):
        raise ValueError(
            f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, not {value[value > 0].min().item():.3g}"
        )


def checked_acceptance(how: Sequence[Tensor]) -> Acceptance | None:
    """The fields of an Acceptance as a custom op gets them, empty for None; a traced call has not seen their values."""
    for name, value in zip(Acceptance._fields, how, strict=False):
        if name in _LIMITS and _check.values_wanted(value.device):
            _check_column(name, value)
    return Acceptance(*how) if how else None


def _seed(batch: int, seed: int | Sequence[int] | Tensor | None) -> int | list[int] | Tensor:
    if seed is None and torch.compiler.is_compiling():  # a traced call cannot ask the system: torch's generator instead
        return torch.randint(2**63 - 1, (batch,), dtype=torch.int64, device="cpu")
    if seed is None:
        return [secrets.randbits(63) for _ in range(batch)]
    if isinstance(seed, Tensor):
        return _check.tensor("seed", seed, shape=(batch,), dtype=torch.int64)
    if isinstance(seed, Sequence) and not isinstance(seed, (str, bytes)):
        return [_check.integer(f"seed[{i}]", one, -(2**63), 2**63 - 1) for i, one in enumerate(seed)]
    return _check.integer("seed", seed, -(2**63), 2**63 - 1)


def _depth(parents: Tensor) -> int:
    """Largest depth of any tree in `parents`: work on the host, which a driver avoids by passing max_depth."""
    if parents.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError("max_depth must be given when parents is on the device and a CUDA graph is being captured")
    return max(map(deepest, parents.reshape(-1, parents.shape[-1]).tolist()))


def checked_tree(
    batch: int, n: int, vocab: int, tree_tokens: Tensor, parents: Tensor, max_depth: int | None, device: torch.device
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """tree_tokens and parents, checked and on the device, and the three results, allocated."""
    _check.tensor("tree_tokens", tree_tokens, shape=(batch, n), dtype=torch.int32, device=device)
    if _check.values_wanted(device):
        _check.all_between("tree_tokens", tree_tokens, 0, vocab - 1)
    on_device = _check.parents(parents, batch, n, device)
    depth = _depth(parents) if max_depth is None or _check.values_wanted(parents.device) else 0
    max_depth = _check.integer("max_depth", depth if max_depth is None else max_depth, 0, _check.MAX_NODES - 1)
    if max_depth < depth:
        raise ValueError(f"max_depth must be at least the tree's depth {depth}, not {max_depth}")
    return (tree_tokens.contiguous(), on_device), new_results(batch, max_depth, device)


def new_results(batch: int, max_depth: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """accepted_nodes, accept_length and next_token, uninitialised."""
    shapes = (batch, max_depth + 1), (batch,), (batch,)
    return tuple(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes)


def check_depth_for_tracing(max_depth: int | None) -> None:
    if max_depth is None:
        raise ValueError(
            "max_depth must be given under torch.compile: the result's width cannot depend on parents' values"
        )


def _checked(logits, tree_tokens, parents, how, max_depth, backend):
    batch, n, vocab = logits.shape
    _check.in_range("logits' number of nodes", n, 1, _check.MAX_NODES)
    _check.in_range("logits' vocabulary", vocab, 1, 2**31 - 1)
    tree, results = checked_tree(batch, n, vocab, tree_tokens, parents, max_depth, logits.device)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    launch = resolve("verify_tree", BACKENDS, backend, logits.device)
    launch(logits, *tree, how, *results)
    return results


@custom_op("verify_tree")
def _op(
    logits: Tensor, tree_tokens: Tensor, parents: Tensor, how: list[Tensor], max_depth: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`how` is the fields of an Acceptance, or empty: every sequence is greedy."""
    return _checked(logits, tree_tokens, parents, checked_acceptance(how), max_depth, backend)


@_op.register_fake
def _fake(logits, tree_tokens, parents, how, max_depth, backend):
    return new_results(logits.shape[0], max_depth, logits.device)
