"""What a whole decoding step takes on this machine, for several trees side by side."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from tqdm import tqdm

from medusa_kernels import Tree

from .captured import CapturedStep, Cuda
from .decode import Decoder
from .draft import MedusaDrafter
from .model import Model
from .stopwatch import Stopwatch

WARM_UP = 2  # rounds whose times are dropped: page faults, clocks, on a GPU the capture


def step_samples(
    model: Model, drafter: MedusaDrafter, trees: Sequence[Tree], prompts: list[list[int]], rounds: int
) -> dict[int, list[float]]:
    """{nodes: seconds of whole steps behind the prompts}: every tree once a round, in an order of its own, so that a
    busy moment of the machine hits all of them alike. On a GPU they are replayed, as the engine's are.
    """
    context, gpu = len(prompts[0]), Cuda.of(model)
    decoders, steps = {}, {}
    for tree in trees:
        room = context + tree.max_depth + 1
        decoders[tree.num_nodes] = decoder = Decoder(model, drafter, tree, batch=len(prompts), max_seqlen=room)
        decoder.start(prompts, None)
        steps[tree.num_nodes] = decoder.step if gpu is None else CapturedStep(decoder, gpu)
    samples: dict[int, list[float]] = {nodes: [] for nodes in decoders}
    watch = Stopwatch()
    for number in tqdm(range(WARM_UP + rounds), desc=f"steps, batch {len(prompts)}", unit="round", disable=None):
        for nodes in random.Random(number).sample(list(decoders), len(decoders)):
            decoders[nodes].cache.seqlens.fill_(context)  # every step is the first one behind the prompt
            _wait(model.device)
            watch.lap()
            steps[nodes]()
            _wait(model.device)
            samples[nodes].append(watch.lap())
    return {nodes: times[WARM_UP:] for nodes, times in samples.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
