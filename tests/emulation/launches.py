"""The launches of the backend "cuda-emulated": those of CUDA, taking CPU tensors."""

from __future__ import annotations

import functools
import importlib

from medusa_kernels.native import with_workspace
from tests.backends import OPS

from . import build


def launch(op: str, *tensors, **options) -> None:
    """`options`: those of the op's `arguments` that are no tensors' matter."""
    native = importlib.import_module(f"medusa_kernels.native.{op}")
    emulated = build.module().cuda
    arguments = functools.partial(native.arguments, **options)
    needs_workspace = hasattr(emulated, f"{op}_workspace")
    if needs_workspace:
        arguments = with_workspace(op, arguments, emulated)
    given = arguments(*tensors)
    getattr(emulated, op)(*given, 0)
    if needs_workspace:
        assert not given[-1].tensor.any(), f"{op} left a counter above 0: the next launch would go wrong"


LAUNCHES = {op: functools.partial(launch, op) for op in OPS if hasattr(build.module().cuda, op)}
