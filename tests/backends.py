"""The backends that can run here, each as a callable that takes an op's front-door arguments.

`matrix(op, cases)` pairs them with the cases they take; a pair that cannot run is not collected, and test_backends.py
asserts which backends must be here. To add one, add a row to `_candidates`. A backend with `launches` stands in for the
op's own table (tests/emulation runs the CUDA kernels' bodies on CPU tensors this way), so it gets the same checks and
the same outputs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import medusa_kernels
from medusa_kernels import _backends

OPS = (
    "tree_attention",
    "draft_heads",
    "verify_tree",
    "verify_lm_head",
    "compact_kv",
    "rms_norm",
    "rotary_append",
    "silu_mul",
    "linear",
)
WRITTEN = {  # the arguments an op changes in place; it may write no other
    "compact_kv": ("kv_cache",),
    "rms_norm": ("residual",),
    "rotary_append": ("q", "k_cache", "v_cache"),
}


@dataclass(frozen=True)
class Backend:
    id: str
    door: str  # the front door's name for it
    isa: str | None = None
    device: str = "cpu"
    launches: Mapping[str, Callable] | None = None
    max_work: float = float("inf")  # multiply-adds that one case may cost
    max_draws: float = float("inf")  # rows of logits that one case may draw a token from
    narrow: bool = False  # head_dim a multiple of 8, and the cache in the query's dtype

    @property
    def fast(self) -> bool:
        """Not interpreted or emulated."""
        return self.max_work == float("inf")

    def unavailable(self, op: str) -> str:
        if self.launches is not None:
            return "" if op in self.launches else "not emulated"
        launch = _module(op).BACKENDS.get(self.door)
        return _backends.unavailable(launch) if launch else f"{op} has no backend {self.door!r}"

    def takes(self, case: object) -> bool:
        if getattr(case, "work", 0) > self.max_work or getattr(case, "draws", 0) > self.max_draws:
            return False
        return not self.narrow or (getattr(case, "head_dim", 8) % 8 == 0 and not getattr(case, "mixed", False))

    @contextlib.contextmanager
    def active(self) -> Iterator[Backend]:
        """Forces the instruction set, and fills with NaN what the front doors leave uninitialised."""
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        if self.isa:
            _backends._C.cpu.force_isa(self.isa)
        try:
            yield self
        finally:
            if self.isa:
                _backends._C.cpu.force_isa("auto")
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])

    def run(self, op: str, *args, **kwargs):
        """Calls the op's front door on copies, writes back what it may write, and fails if it wrote anything else."""
        named = dict(zip(_parameters(op), args, strict=False)) | kwargs
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        memory = {_key(t): _bytes(t).clone().to(self.device) for t in tensors.values()}
        copies = {
            name: torch.empty(0, dtype=t.dtype, device=self.device).set_(
                memory[_key(t)].untyped_storage(), t.storage_offset(), t.shape, t.stride()
            )
            for name, t in tensors.items()
        }
        with self._stand_in(op) as door:
            result = getattr(medusa_kernels, op)(**named | copies, backend=door)
        written = {_key(tensors[name]) for name in WRITTEN.get(op, ()) if name in tensors}
        for name, t in tensors.items():
            if _key(t) in written:
                _bytes(t).copy_(memory[_key(t)])
            else:
                assert torch.equal(_bytes(t), memory[_key(t)].cpu()), f"{op} ({self.id}) wrote to its argument {name}"
        return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.cpu(), result)

    @contextlib.contextmanager
    def _stand_in(self, op: str) -> Iterator[str]:
        if self.launches is None:
            yield self.door
            return
        table = _module(op).BACKENDS
        own = table["reference"]
        table["reference"] = self.launches[op]
        try:
            yield "reference"
        finally:
            table["reference"] = own


REFERENCE = Backend("reference", "reference")
problems: dict[str, str] = {}  # why a backend that should be here is not; test_backends.py fails on any


@functools.cache
def _candidates() -> tuple[Backend, ...]:
    found = [REFERENCE]
    if _backends._C is not None:
        found += [Backend(f"cpu-{isa}", "cpu", isa=isa) for isa in ("avx512", "avx2", "portable") if _has_isa(isa)]
    if torch.cuda.is_available():
        found += [Backend(name, name, device="cuda", narrow=True) for name in ("cuda", "triton")]
        return tuple(found)
    if importlib.util.find_spec("triton"):
        quicken_interpreter()
    found.append(Backend("triton-interpreted", "triton", max_work=1e6, max_draws=10))
    if (Path(__file__).parent / "emulation" / "launches.py").exists():
        try:
            launches = importlib.import_module("tests.emulation.launches").LAUNCHES
        except RuntimeError as error:  # it did not compile: one test says so, the others still run
            problems["cuda-emulated"] = str(error)
        else:
            found.append(Backend("cuda-emulated", "cuda", launches=launches, max_work=1e6, narrow=True))
    return tuple(found)


def quicken_interpreter() -> None:
    """Triton's interpreter prepares `triton.language` anew whenever a kernel function calls another: half its time."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    prepare_and_call = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        modules = [value for value in self.fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(module.arange) for module in modules):
            return prepare_and_call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call


def _has_isa(name: str) -> bool:
    try:
        _backends._C.cpu.force_isa(name)
    except (ValueError, RuntimeError):
        return False
    _backends._C.cpu.force_isa("auto")
    return True


def backends_for(op: str) -> list[Backend]:
    return [backend for backend in _candidates() if not backend.unavailable(op)]


def matrix(
    op: str, cases: Iterable, *, reference: bool = True, ids: Callable[[object], str] = str
) -> pytest.MarkDecorator:
    """Parametrises (backend, case) over every backend that runs `op` here and takes the case."""
    pairs = [
        pytest.param(backend, case, id=f"{backend.id}-{ids(case)}")
        for case in cases
        for backend in backends_for(op)
        if backend.takes(case) and (reference or backend != REFERENCE)
    ]
    return pytest.mark.parametrize(("backend", "case"), pairs, indirect=["backend"])


def every_backend(op: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("backend", [pytest.param(b, id=b.id) for b in backends_for(op)], indirect=True)


def _module(op: str):
    return importlib.import_module(f"medusa_kernels.{op}")


@functools.cache
def _parameters(op: str) -> tuple[str, ...]:
    return tuple(inspect.signature(getattr(medusa_kernels, op)).parameters)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> Tensor:
    """Everything behind a view, flat: also what lies between its elements."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
