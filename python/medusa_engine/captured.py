"""Steps on a GPU: each one CUDA graph, launched while the host still reads what the last one brought.

A step needs nothing from the host. So the next step is launched before the last one's tokens are read, and the GPU
never waits. The price: of a sequence that ends, the host learns `RUN_AHEAD` steps late. It has decoded on by then; the
cache has rows for that, and nobody reads those tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from medusa_kernels.launches import capturable
from medusa_kernels.verify_tree import Acceptance

from .decode import Decoder
from .model import Model

RUN_AHEAD = 1  # steps under way while the host reads one


class Cuda:
    """What captured steps ask of CUDA, of this device, whichever is current."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    @classmethod
    def of(cls, model: Model) -> Cuda | None:
        """For a model on a GPU whose every launch a graph can hold; else None."""
        on_gpu = model.device.type == "cuda" and all(map(capturable, model.launch.values()))
        return cls(model.device) if on_gpu else None

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work` as a graph, not run yet: the call that launches it on the current stream. All it needs was loaded."""
        graph = torch.cuda.CUDAGraph()
        with self._current():
            if self._stream is None:  # one for every capture: cuBLAS keeps a workspace for each stream it meets
                self._stream = torch.cuda.Stream()
            # What other threads do with CUDA meanwhile is their own business.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                work()

        def replay() -> None:
            with self._current():
                graph.replay()

        return replay

    def host_like(self, tensor: Tensor) -> Tensor:
        """Host memory that the device writes to without the host's help."""
        with self._current():  # elsewhere, pinning would wake a device that nobody uses
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)

    def send(self, tensor: Tensor, host: Tensor) -> Callable[[], None]:
        """Enqueues the copy of `tensor` to `host`, behind what was replayed, and returns the call that waits for it."""
        with self._current():
            host.copy_(tensor, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return event.synchronize

    def _current(self) -> torch.cuda.device:
        return torch.cuda.device(self._device)


class CapturedStep:
    """A decoder's four verbs, replayed from a graph.

    The first step of its kind runs verb by verb: that loads every kernel, as a capture must not, and being a step like
    any other it leaves nothing to undo. The second is captured, which runs nothing, and replayed, as all that follow.
    """

    def __init__(self, decoder: Decoder, gpu: Cuda):
        self._decoder, self._gpu = decoder, gpu
        self._replays: dict[bool, Callable[[], None] | None] = {}

    def __call__(self) -> None:
        kind = self._decoder.samples
        if kind not in self._replays:
            self._replays[kind] = None
            self._decoder.run()
            return
        if self._replays[kind] is None:
            self._replays[kind] = self._gpu.capture(self._decoder.run)
        self._replays[kind]()


class Steps:
    """A decoder's steps, each read before the next one starts."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    def start(self, prompts: Sequence[list[int]], acceptance: Acceptance | None) -> list[list[int]]:
        """Prefills; the first token of each sequence."""
        return [[token] for token in self.decoder.start(prompts, acceptance)]

    def next(self, needed: int) -> list[list[int]]:
        """The tokens that each sequence gains by the next step. No more than `needed` steps will be asked for."""
        return self.decoder.step()


class StepsAhead(Steps):
    """The same steps, captured, of which up to `decoder.run_ahead` are under way while one is read.

    Attributes:
        step: launches one more step, without reading it.
    """

    def __init__(self, decoder: Decoder, gpu: Cuda):
        super().__init__(decoder)
        self.step = CapturedStep(decoder, gpu)
        self._gpu = gpu
        self._free = deque(gpu.host_like(decoder.outcome.block) for _ in range(1 + decoder.run_ahead))
        self._sent: deque[tuple[Tensor, Callable[[], None]]] = deque()

    def start(self, prompts: Sequence[list[int]], acceptance: Acceptance | None) -> list[list[int]]:
        while self._sent:  # launched for a text that ended before them
            self._received()
        return super().start(prompts, acceptance)

    def next(self, needed: int) -> list[list[int]]:
        while self._free and len(self._sent) < needed:
            self.step()
            host = self._free.popleft()
            self._sent.append((host, self._gpu.send(self.decoder.outcome.block, host)))
        return self.decoder.outcome.read(self._received())

    def _received(self) -> Tensor:
        """The oldest block under way, once it is here: good until the next step is launched."""
        host, wait = self._sent.popleft()
        wait()
        self._free.append(host)
        return host


def steps_of(decoder: Decoder, gpu: Cuda | None) -> Steps:
    """The decoder's steps, ahead of the host where `gpu` is given and the draft needs no host."""
    draft = decoder.draft
    return Steps(decoder) if gpu is None or (draft and not draft.capturable) else StepsAhead(decoder, gpu)
