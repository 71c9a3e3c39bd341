"""Plain decoding of the same geometries by what a user would take instead, and Medusa on a real model."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from medusa_engine import Medusa, benchmark
from medusa_engine.engine import DEFAULT_HEADS

from . import geometry
from .compiled import CompiledDecoder
from .decoding import GROUPS, ROWS_SPARE, STEPS, model_of
from .harness import Case, Options

NEW_TOKENS = 32
# name: options of transformers' generate. Its static cache compiles the forward pass by itself unless told not to.
TRANSFORMERS = {
    "transformers, dynamic cache": {},
    "transformers, static cache": {"cache_implementation": "static", "disable_compile": True},
    "transformers, static cache, compiled": {"cache_implementation": "static"},
}


def cases(options: Options) -> list[Case]:
    shapes = [(name, batch, context) for batch, context in ((1, 512), (1, 8192), (16, 512)) for name in
              geometry.GEOMETRIES]  # fmt: skip
    torch_compile = [
        Case(f"torch.compile {name} b{batch} context{context}", functools.partial(compiled, name, batch, context))
        for name, batch, context in shapes
    ]
    generate = [
        Case(f"{rival} {name} b{batch} context{context}",
             functools.partial(transformers, rival, name, batch, context))
        for name, batch, context in shapes[:2] + shapes[4:] for rival in TRANSFORMERS
    ]  # fmt: skip
    return torch_compile[:2] + generate[:3] + torch_compile[2:] + generate[3:]


def compiled(name: str, batch: int, context: int) -> Iterator[dict]:
    """Steps of a torch.compile'd decoder with a static cache, in one CUDA graph."""
    _, model = model_of(name)
    torch._dynamo.reset()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.stream(stream):
        decoder = CompiledDecoder(model, batch=batch, rows=context + ROWS_SPARE)
        for k, v in decoder.caches:
            k.normal_(), v.normal_()
        decoder.position.fill_(context)
        for _ in range(3):
            decoder.step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            decoder.step()
        taken = []
        for _ in range(1 + GROUPS):
            decoder.position.fill_(context)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(STEPS):
                graph.replay()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3 / STEPS)
    yield row(name, batch, context, "torch.compile, static cache, CUDA graph", statistics.median(taken[1:]))


@functools.lru_cache(maxsize=1)
def transformers_model(name: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    c = geometry.GEOMETRIES[name]
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=40960,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def transformers(rival: str, name: str, batch: int, context: int) -> Iterator[dict]:
    """The time of NEW_TOKENS more tokens in `generate`, its prefill taken off."""
    model_of.cache_clear()  # their weights are a second model's
    model = transformers_model(name)
    generator = torch.Generator("cuda").manual_seed(0)
    prompt = torch.randint(3, 31000, (batch, context), device="cuda", generator=generator)

    def seconds(new_tokens: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        options = {"max_new_tokens": new_tokens, "do_sample": False, **TRANSFORMERS[rival]}
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    few = 8
    with torch.no_grad():
        for count in (NEW_TOKENS + few, few):  # the larger static cache first: the other then takes it too
            seconds(count)
        pairs = [(seconds(few), seconds(NEW_TOKENS + few)) for _ in range(3)]
    yield row(name, batch, context, rival, statistics.median(many - less for less, many in pairs) / NEW_TOKENS)


def row(name: str, batch: int, context: int, decoding: str, seconds: float) -> dict:
    return {
        "benchmark": "step",
        "model": name,
        "dtype": "bfloat16",
        "batch": batch,
        "context": context,
        "decoding": decoding,
        "step_us": 1e6 * seconds,
        "tokens_per_step": 1.0,
        "tokens_per_second": batch / seconds,
    }


def real_model(options: Options) -> list[Case]:
    return [Case("real model", functools.partial(real, options))]


def real(options: Options, max_new_tokens: int = 128) -> Iterator[dict]:
    """Real weights, real heads, real text: plain decoding and Medusa over the chat prompts."""
    if options.model is None or not Path(options.model).exists():
        yield {"benchmark": "skipped", "reason": f"no model at {options.model}" if options.model else "no --model"}
        return
    engine = Medusa.from_pretrained(options.model, options.heads or DEFAULT_HEADS, device="cuda")
    prompts = benchmark.load_prompts("chat")
    yield benchmark.compare(engine, prompts, prompt_set="chat", max_new_tokens=max_new_tokens)
