"""For engines: the unchecked launches behind the front doors, resolved once instead of at every call."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable

import torch

from ._backends import NAMES, Lazy, Native, Plan, resolve
from .compact_kv import BACKENDS as compact_kv
from .draft_heads import BACKENDS as draft_heads
from .linear import BACKENDS as linear
from .linear import resolve_row_invariant as row_invariant_linear
from .rms_norm import BACKENDS as rms_norm
from .rotary_append import BACKENDS as rotary_append
from .silu_mul import BACKENDS as silu_mul
from .tree_attention import BACKENDS as tree_attention
from .tree_attention import resolve_row_invariant as row_invariant_attention
from .verify_lm_head import BACKENDS as verify_lm_head
from .verify_tree import BACKENDS as verify_tree

_BACKENDS = {
    "compact_kv": compact_kv,
    "draft_heads": draft_heads,
    "linear": linear,
    "rms_norm": rms_norm,
    "rotary_append": rotary_append,
    "silu_mul": silu_mul,
    "tree_attention": tree_attention,
    "verify_lm_head": verify_lm_head,
    "verify_tree": verify_tree,
}


def resolve_all(backend: str, device: torch.device, *, row_invariant: bool = False) -> dict[str, Callable[..., None]]:
    """Each op's launch for tensors on `device`. An op that `backend` does not have at all gets its "auto" launch: with
    "triton", which has the four Medusa ops, the others run in CUDA on NVIDIA GPUs and in PyTorch on AMD's.

    A launch takes checked tensors and allocated outputs, in the order of `reference/<op>.py`. With `row_invariant` no
    row's result depends on the rows beside it, down to the last bit: on the CPU they never do, and in CUDA attention
    and the linear layers alone must be asked for it.

    Raises:
        ValueError: the backend is unknown, or not available for an op it has.
    """
    if backend != "auto" and backend not in NAMES:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, NAMES))}, not {backend!r}")
    found = {
        op: resolve(op, backends, backend if backend in backends else "auto", device)
        for op, backends in _BACKENDS.items()
    }
    if row_invariant:
        found["tree_attention"] = row_invariant_attention(backend, device)
        found["linear"] = row_invariant_linear(backend, device)
    return found


def auto_backend(device: torch.device) -> str:
    """What "auto" stands for on this device, for tree attention: the op that every backend has."""
    launch = resolve("tree_attention", tree_attention, "auto", device)
    return next(name for name, candidate in tree_attention.items() if candidate is launch)


def bind(launch: Callable[..., None], *tensors) -> Callable[[], None]:
    """A call that repeats this launch on these very tensors, and keeps them alive."""
    return launch.bind(*tensors) if isinstance(launch, Native) else functools.partial(launch, *tensors)


def capturable(launch: Callable[..., None]) -> bool:
    """Whether a CUDA graph can hold this launch: it enqueues kernels and reads no value, as the reference may."""
    return isinstance(launch, (Native, Lazy))


def plan(calls: Iterable[Callable[[], None]]) -> Callable[[], None]:
    """One call that makes these calls, in their order; neighbours that the CPU's kernels answer run as one."""

    def on_cpu(call: Callable[[], None]) -> bool:
        return getattr(getattr(call, "launch", None), "device", None) == "cpu"

    parts: list[Callable[[], None]] = []
    for together, group in itertools.groupby(calls, on_cpu):
        listed = list(group)
        parts += [Plan(listed)] if together else listed

    def run() -> None:
        for part in parts:
            part()

    return parts[0] if len(parts) == 1 else run
