"""Which backends stand behind an op, and which of them can run here.

An op's front door holds a plain dict from backend name to launch. A launch takes the op's tensors, checked, and its
outputs, allocated, and returns nothing. `resolve` picks one and says why when it cannot.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence

import torch

NAMES = ("reference", "cpu", "cuda", "triton")

try:
    from medusa_kernels import _C
except ImportError as error:  # a source tree that was never built: the reference still runs
    _C, _BUILD_ERROR = None, str(error)
else:
    _BUILD_ERROR = ""


_NO_CHANGE = contextlib.nullcontext()


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a GPU the current one for a while: a kernel goes there whatever its tensors, and every GPU's default stream
    has the same handle.
    """
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _NO_CHANGE  # the usual case, which pays for no context of its own
    return torch.cuda.device(device)


class Native:
    """A launch of the compiled module: `arguments` turns the op's tensors into the addresses and sizes the binding
    takes.
    """

    def __init__(self, device: str, op: str, arguments: Callable[..., tuple]):
        self.device, self.op, self.arguments = device, op, arguments

    @functools.cached_property
    def function(self) -> Callable[..., None]:
        return getattr(getattr(_C, self.device), self.op)

    def unavailable(self) -> str:
        if _C is None:
            return f"medusa_kernels._C is not built ({_BUILD_ERROR}); run `pip install -e .`"
        if not hasattr(getattr(_C, self.device, None), self.op):
            return "the module was built without CUDA" if self.device == "cuda" else "the module lacks it"
        return cuda_unavailable() if self.device == "cuda" else ""

    def __call__(self, *tensors) -> None:
        self.bind(*tensors)()

    def bind(self, *tensors) -> Callable[[], None]:
        """A call that repeats this launch on these very tensors: nothing is looked up or converted again.

        On CUDA it goes to the tensors' device and the stream that is current there at the call, as PyTorch's own ops
        do, so that a graph captures it. Launches that were bound under one stream share a workspace: they must not run
        beside each other.
        """
        device = tensors[0].device
        with on(device):  # how much workspace depends on the device
            launch = functools.partial(self.function, *self.arguments(*tensors))
        if self.device == "cuda":

            def call() -> None:
                with on(device):
                    launch(torch.cuda.current_stream(device).cuda_stream)

        else:
            call = launch
        call.launch, call.kept_alive = self, tensors  # the addresses must stay theirs
        return call


class Plan:
    """Bound launches of the CPU's kernels as one call: nothing of Python runs between them."""

    def __init__(self, calls: Sequence[Callable[[], None]]):
        self._calls = calls  # they keep their tensors alive
        self._run = _C.cpu.Plan()
        for call in calls:
            getattr(self._run, call.launch.op)(*call.args)

    def __call__(self) -> None:
        self._run()


class Lazy:
    """A launch whose module is imported at its first use: `import medusa_kernels` must not import Triton."""

    def __init__(self, module: str):
        self.module = module

    def unavailable(self) -> str:
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            return str(error)
        return ""

    def __call__(self, *tensors) -> None:
        with on(tensors[0].device):
            importlib.import_module(self.module).launch(*tensors)


@functools.cache
def cuda_unavailable() -> str:
    """Why no CUDA kernel can run here, or an empty string."""
    if _C is None or not _C.built_with_cuda:
        return "the module was built without CUDA"
    count, reason = _C.cuda_device_count()
    return "" if count else f"no CUDA device: {reason}"


def unavailable(launch: Callable[..., None]) -> str:
    return launch.unavailable() if isinstance(launch, (Native, Lazy)) else ""


def resolve(
    op: str, backends: Mapping[str, Callable[..., None]], backend: str, device: torch.device
) -> Callable[..., None]:
    """The launch of `backend`, or for "auto" the fastest one that runs on `device`.

    Raises:
        ValueError: the backend is unknown, does not run on the tensors' device, or is not available here.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{op} takes tensors on a cpu or cuda device, not on {device}")
    if backend == "auto":
        order = ("cuda", "triton", "reference") if device.type == "cuda" else ("cpu", "reference")
        return next(backends[name] for name in order if name in backends and not unavailable(backends[name]))
    if backend not in NAMES:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, NAMES))}, not {backend!r}")
    if backend not in backends:
        raise ValueError(f"backend {backend!r} is not available for {op}: it has {', '.join(map(repr, backends))}")
    if reason := unavailable(backends[backend]):
        raise ValueError(f"backend {backend!r} is not available for {op}: {reason}")
    if backend in ("cpu", "cuda") and device.type != backend:
        raise ValueError(f"backend {backend!r} takes tensors on a {backend} device, not on {device}")
    if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "backend 'triton' takes tensors on a cuda device (on the CPU under TRITON_INTERPRET=1), not on cpu"
        )
    return backends[backend]
