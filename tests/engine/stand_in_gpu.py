"""A GPU's part in captured steps, played by the CPU: graphs replay on the tensors they met, and copies arrive late.

What a CUDA graph forbids is forbidden here too: to read a value on the host, and to make a tensor of the host's values.
What it does not notice goes wrong here as there: a tensor that was replaced by another after the capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from medusa_kernels._backends import Native

_HOST_READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"}
_HOST_WRITES = {"lift_fresh", "lift_fresh_copy", "lift"}  # torch.tensor(...)
UNREAD = -(2**30)


class Tape(TorchDispatchMode):
    """The tensor ops and native launches of a block. Those that write wait for `replay`; the others run once, for the
    tensors they make.
    """

    running: Tape | None = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __enter__(self):
        Tape.running = self
        return super().__enter__()

    def __exit__(self, *error):
        Tape.running = None
        return super().__exit__(*error)

    def replay(self) -> None:
        for call in self.calls:
            call()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in _HOST_READS | _HOST_WRITES:
            raise AssertionError(f"{name} needs the host inside a captured step")
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        aliased = [a for a in func._schema.arguments if a.alias_info is not None]
        written = [given[a.name] for a in aliased if a.alias_info.is_write]
        if written:
            self.calls.append(lambda: func(*args, **kwargs))
            return written[0] if len(written) == 1 else tuple(written)
        made = func(*args, **kwargs)
        if not aliased:  # not a view

            def again() -> None:
                for old, new in zip(*(_pytree.tree_leaves(t) for t in (made, func(*args, **kwargs))), strict=True):
                    old.copy_(new)

            self.calls.append(again)
        return made


class StandIn:
    """Stands where `captured.Cuda` does. Counts what was captured; `log` holds "send" and "wait" as they happened."""

    def __init__(self) -> None:
        self.captured, self.log = 0, []

    @property
    def sent(self) -> int:
        return self.log.count("send")

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        tape = Tape()
        with tape:
            work()
        return tape.replay

    def host_like(self, tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, UNREAD)

    def send(self, tensor: Tensor, host: Tensor) -> Callable[[], None]:
        self.log.append("send")
        there = tensor.clone()
        host.fill_(UNREAD)  # whoever reads too early, or a block in use, finds no token

        def wait() -> None:
            self.log.append("wait")
            host.copy_(there)

        return wait


@contextlib.contextmanager
def native_launches_on_tape() -> Iterator[None]:
    """Launches bound inside the block go to the running tape, as those of PyTorch do by themselves."""
    bind = Native.bind

    def bound(self: Native, *tensors) -> Callable[[], None]:
        call = bind(self, *tensors)
        return lambda: Tape.running.calls.append(call) if Tape.running else call()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Native, "bind", bound)
        yield
