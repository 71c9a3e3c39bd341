"""Does the engine's own way on a GPU, graphs ahead of the host, bring what steps in turn do? On a tiny random model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import tokenizers
import torch

from medusa_engine import Medusa
from medusa_engine.captured import RUN_AHEAD, Cuda, StepsAhead
from medusa_engine.config import ModelConfig
from medusa_engine.decode import Decoder
from medusa_engine.model import Model
from medusa_engine.observe import moments
from medusa_engine.rope import RopeConfig
from medusa_engine.sampling import SamplingOptions
from medusa_engine.tokenizer import Tokenizer

from . import geometry

TINY = ModelConfig(
    architecture="llama", vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=64, rms_norm_eps=1e-5, rope=RopeConfig(), max_position_embeddings=1024,
)  # fmt: skip
PROMPTS = [[3, 1, 4, 1, 5], list(range(100)), [7]]
NEW_TOKENS = 40
# draft, tree. The last two guess right often and always, which random heads do not.
SOURCES = [("medusa", "4x2x2"), ("medusa", "dynamic-12"), ("first-layers:2", "chain-3"), ("first-layers:3", "chain-4")]
SAMPLED = [
    SamplingOptions(),
    SamplingOptions("lossless", temperature=0.8, top_p=0.95, seed=5),
    SamplingOptions(["greedy", "typical", "lossless"], temperature=[1.0, 0.7, 1.5], top_k=[0, 0, 40], seed=[1, 2, 3]),
    SamplingOptions(),
]


@dataclass
class SpelledCheckpoint(geometry.RandomCheckpoint):
    """A random checkpoint with a tokenizer: token i is spelled " <i>"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        vocab = {f" <{i}>": i for i in range(self.config.vocab_size)}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=" <0>"))
        backend.decoder = tokenizers.decoders.Fuse()
        self.tokenizer = Tokenizer(backend, {}, None)


def engine(draft: str, tree: str, *, device: str, backend: str, eos: tuple[int, ...] = ()) -> Medusa:
    checkpoint = SpelledCheckpoint(replace(TINY, eos_token_ids=eos), "cpu")
    model = Model(checkpoint, backend=backend, device=torch.device(device), dtype="float32", max_positions=1024)
    heads = geometry.random_heads(checkpoint, own_lm_heads=False) if draft == "medusa" else None
    return Medusa(checkpoint, heads, model, tree, 400, draft)


def differs(engine_of: Callable[..., Medusa], draft: str, tree: str) -> str:
    """How the engine's generations differ from steps in turn by the same kernels; else an empty string.

    `engine_of(draft, tree, eos=...)` is `engine` on some device. One engine and so one decoder serves every call.
    """
    (said, *_) = engine_of(draft, tree).generate(PROMPTS, NEW_TOKENS).token_ids
    ending = engine_of(draft, tree, eos=(said[NEW_TOKENS // 2],))
    stop = f" <{said[NEW_TOKENS // 3]}>"[2:]  # begins inside a token
    for number, options in enumerate(SAMPLED):
        for limits in ({"ignore_eos": True}, {}, {"stop": [stop]}):
            theirs = list(moments(ending, PROMPTS, NEW_TOKENS, options, **limits))
            ours = ending.generate(PROMPTS, NEW_TOKENS, **vars(options), **limits)
            steps = [sum(bool(moment.gained[b]) for moment in theirs[1:]) for b in range(len(PROMPTS))]
            for name, expected, found in (
                ("tokens", [t.token_ids for t in theirs[-1].transcripts], ours.token_ids),
                ("texts", [t.text for t in theirs[-1].transcripts], ours.text),
                ("ends", [t.finish_reason for t in theirs[-1].transcripts], ours.finish_reason),
                ("steps", steps, [one.steps for one in ours.stats.per_sequence]),
            ):
                if found != expected:
                    return f"options {number}, {limits}: other {name} than steps in turn"
    return ""


def waits_for_the_host(draft: str, tree: str, *, device: str = "cuda") -> str:
    """What of a step makes PyTorch wait for the GPU, verb by verb and from a graph; else an empty string."""
    tiny = engine(draft, tree, device=device, backend="auto")
    decoder = Decoder(
        tiny.model, tiny.drafter, tiny.tree(len(PROMPTS)), batch=len(PROMPTS), max_seqlen=400, run_ahead=RUN_AHEAD
    )
    gpu = Cuda(tiny.model.device)
    steps = StepsAhead(decoder, gpu)
    for options in SAMPLED[:2]:
        steps.start(PROMPTS, options.acceptance(len(PROMPTS), tiny.model.device))
        for _ in range(2):  # verb by verb, then captured
            steps.next(1)
        host = gpu.host_like(decoder.outcome.block)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            decoder.run()
            steps.step()
            gpu.send(decoder.outcome.block, host)
            decoder.retire(0)
            steps.step()
        except RuntimeError as error:
            return f"{error}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return ""
