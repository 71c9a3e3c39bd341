"""The engines that bench.peers sets side by side, each in a process of its own: `python -m bench.peer_engines SPEC`.

A worker loads one engine at one precision and then answers, line by line, {"ids": [...], "max_new_tokens": n} with
{"tokens": [...], "decode_seconds": s}: greedy, past the end-of-sequence token, and timed from the first new token on,
so that no prefill is in it. Its first line is {"ready": ...} or {"missing": why}. Between two lines it sleeps.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any

from medusa_engine.benchmark import installed_version


@dataclass(frozen=True)
class Contestant:
    """One bar of the chart: an engine, how it decodes, and how its weights are stored."""

    engine: str
    mode: str
    precision: str
    bits: int

    @property
    def name(self) -> str:
        return " ".join((self.engine, self.mode, self.precision))

    @property
    def is_ours(self) -> bool:
        return self.engine == "ours"


CONTESTANTS = (
    Contestant("ours", "plain", "bfloat16", 16),
    Contestant("ours", "medusa", "bfloat16", 16),
    Contestant("ours", "plain", "int8", 8),
    Contestant("ours", "medusa", "int8", 8),
    Contestant("transformers", "generate", "float32", 32),
    Contestant("transformers", "generate", "bfloat16", 16),
    *(Contestant("llama.cpp", "greedy", kind, bits) for kind, bits in
      (("BF16", 16), ("F16", 16), ("Q8_0", 8), ("Q4_1", 4))),
    *(Contestant("openvino", "greedy", kind, bits) for kind, bits in (("F16", 16), ("Q8_0", 8), ("Q4_1", 4))),
)  # fmt: skip
PEERS = tuple(dict.fromkeys(c.engine for c in CONTESTANTS))

Reply = dict[str, Any]
Run = Callable[[list[int], int], Reply]


@dataclass(frozen=True)
class Spec:
    """What a worker is told. `context`: the most tokens of a prompt and its answer."""

    contestant: Contestant
    threads: int
    context: int
    tree: str | int | list = "auto"

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Spec:
        fields = json.loads(text)
        return cls(Contestant(**fields.pop("contestant")), **fields)

    def environment(self) -> dict[str, str]:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MEDUSA_NUM_THREADS")
        return {name: str(self.threads) for name in names}


class Missing(Exception):
    """The engine is not installed here."""


def ours(spec: Spec) -> tuple[Run, Reply]:
    import torch

    from medusa_engine import Medusa

    torch.set_num_threads(spec.threads)
    engine = Medusa.from_pretrained(dtype=spec.contestant.precision, backend="cpu", tree=spec.tree)
    medusa = spec.contestant.mode == "medusa"

    def run(ids: list[int], max_new_tokens: int) -> Reply:
        out = engine.generate(ids, max_new_tokens, ignore_eos=True, medusa=medusa)
        return {"tokens": out.token_ids, "decode_seconds": out.stats.decode_seconds, "steps": out.stats.steps}

    nodes = {"tree_nodes": engine.tree(1).num_nodes} if medusa else {}
    return run, {"version": installed_version("medusa-kernels"), **nodes}


def transformers(spec: Spec) -> tuple[Run, Reply]:
    import torch

    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise Missing("transformers is not installed; run `pip install transformers`") from None
    from medusa_engine.default_model import default_model_path

    torch.set_num_threads(spec.threads)
    dtype = getattr(torch, spec.contestant.precision)
    model = AutoModelForCausalLM.from_pretrained(default_model_path(), dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # a processor that forbids EOS would cost it time

    @torch.no_grad()
    def run(ids: list[int], max_new_tokens: int) -> Reply:
        clock = _Arrivals()
        prompt = torch.tensor([ids])
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
        # The first arrival is the prompt itself, the second comes from the prefill.
        return {"tokens": out[0, len(ids) :].tolist(), "decode_seconds": clock.times[-1] - clock.times[1]}

    return run, {"version": installed_version("transformers")}


class _Arrivals:
    """A streamer that keeps the time of every call."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def llama_cpp(spec: Spec) -> tuple[Run, Reply]:
    try:
        import llama_cpp as lib
    except ImportError:
        raise Missing("llama-cpp-python is not installed; run `pip install llama-cpp-python`") from None
    model = lib.Llama(
        str(_gguf(spec)), n_ctx=spec.context, n_threads=spec.threads, n_threads_batch=spec.threads, verbose=False
    )
    greedy = lib.llama_sampler_init_greedy()
    token = (lib.llama_token * 1)()

    def run(ids: list[int], max_new_tokens: int) -> Reply:
        model.reset()
        model.eval(ids)
        tokens = [lib.llama_sampler_sample(greedy, model.ctx, -1)]
        start = time.perf_counter()
        # The C interface, for the Python one copies the logits of every token.
        while len(tokens) < max_new_tokens:
            token[0] = tokens[-1]
            if lib.llama_decode(model.ctx, lib.llama_batch_get_one(token, 1)):
                raise RuntimeError(f"llama_decode failed at token {len(tokens)}")
            tokens.append(lib.llama_sampler_sample(greedy, model.ctx, -1))
        return {"tokens": tokens, "decode_seconds": time.perf_counter() - start}

    return run, {"version": installed_version("llama-cpp-python")}


def openvino(spec: Spec) -> tuple[Run, Reply]:
    try:
        import numpy as np
        import openvino_genai as lib
        from openvino import Tensor
    except ImportError:
        raise Missing("OpenVINO GenAI is not installed; run `pip install openvino-genai`") from None
    pipeline = lib.LLMPipeline(str(_gguf(spec)), "CPU", INFERENCE_NUM_THREADS=spec.threads)
    config = lib.GenerationConfig()
    config.do_sample, config.ignore_eos, config.apply_chat_template = False, True, False

    def run(ids: list[int], max_new_tokens: int) -> Reply:
        config.max_new_tokens = max_new_tokens
        out = pipeline.generate(Tensor(np.array([ids], dtype=np.int64)), config)
        tokens = list(out.tokens[0])
        per_token = out.perf_metrics.get_tpot().mean / 1e3  # of every token but the first
        return {"tokens": tokens, "decode_seconds": per_token * (len(tokens) - 1)}

    return run, {"version": installed_version("openvino-genai")}


def _gguf(spec: Spec):
    from bench.gguf_export import exported
    from medusa_engine.default_model import default_model_path

    return exported(default_model_path(), spec.contestant.precision)


ENGINES = {"ours": ours, "transformers": transformers, "llama.cpp": llama_cpp, "openvino": openvino}


def serve(spec: Spec, requests: Iterator[str], replies: IO[str]) -> None:
    """Answers until the requests end. An exception is the reply to the request that raised it."""

    def reply(value: Reply) -> None:
        print(json.dumps(value), file=replies, flush=True)

    try:
        run, about = ENGINES[spec.contestant.engine](spec)
    except Missing as reason:
        return reply({"missing": str(reason)})
    except Exception as error:  # whatever a foreign engine raises while it loads: it is skipped and says why
        return reply({"missing": f"cannot load: {_line(error)}"})
    reply({"ready": about})
    for line in requests:
        request = json.loads(line)
        try:
            reply(run(request["ids"], request["max_new_tokens"]))
        except Exception as error:  # as above: the others go on
            reply({"failed": _line(error)})


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def main() -> None:
    # Engines print what they like; the replies keep the real stdout to themselves.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(Spec.loads(sys.argv[1]), iter(sys.stdin.readline, ""), replies)


if __name__ == "__main__":
    main()
