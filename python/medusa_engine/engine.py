"""Medusa: a model, its heads or another source of guesses, and a tree, ready to generate."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path

import torch

from medusa_kernels import Tree

from .captured import RUN_AHEAD, Cuda, Steps, steps_of
from .checkpoint import Checkpoint, fetched, open_checkpoint
from .decode import Decoder
from .draft_choice import choose_drafter
from .dynamic_tree import DynamicTree
from .files import read_json_if_any
from .heads import MedusaHeads, heads_from_tensors
from .heads_files import base_model_of, is_heads_only, load_heads
from .machine import cheap_rows, choose_device
from .model import DTYPES, Model
from .output import Chunk, Output, Stats, Transcript
from .rounds import Round, rounds
from .sampling import SamplingOptions
from .stopwatch import Stopwatch
from .tree_choice import choose_tree

DEFAULT_HEADS = Path(__file__).parent / "smollm2_heads"
DEFAULT_MAX_SEQLEN = 4096
# The last step of a text may begin at max_seqlen - 1 and its deepest node stands at most 255 positions further. So does
# that of each step ahead.
SPARE_POSITIONS = 256 * (1 + RUN_AHEAD)

Prompt = str | Sequence[int]


class Medusa:
    """Generates text with a Llama-family model, several tokens a step where something guesses ahead.

    Build one with `from_pretrained`. Not thread-safe: one call at a time.

    Attributes:
        model, tokenizer: the base model and its tokenizer.
        heads: the Medusa heads, or None.
        backend, dtype: as chosen; "auto" and None resolved.
        max_seqlen: prompt + new tokens at most.
        drafter: what guesses ahead, or None.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        heads: MedusaHeads | None,
        model: Model,
        tree: object,
        max_seqlen: int,
        draft: str | os.PathLike = "medusa",
    ):
        self.model, self.tokenizer, self.heads, self.max_seqlen = model, checkpoint.tokenizer, heads, max_seqlen
        self.backend, self.dtype = model.backend, model.dtype_name
        self._eos = tuple(checkpoint.config.eos_token_ids) or tuple(self.tokenizer.eos_token_ids)
        self._checkpoint, self._tree = checkpoint, tree
        positions = max_seqlen + SPARE_POSITIONS
        self.drafter = choose_drafter(draft, model, checkpoint, heads, max_positions=positions)
        if self.drafter is not None:
            self.tree(1)  # a bad tree is an error now, not at the first prompt
        self._gpu = Cuda.of(model)
        self._steps: dict[bool, Steps] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike = "default",
        heads: str | os.PathLike | None = None,
        *,
        draft: str | os.PathLike = "medusa",
        backend: str = "auto",
        device: str | torch.device | None = None,
        dtype: str | None = None,
        tree: str | int | Sequence[Sequence[int]] | Tree = "auto",
        max_seqlen: int | None = None,
        bitwise: bool = False,
    ) -> Medusa:
        """Loads a model and what guesses ahead of it: its Medusa heads, or another source.

        Args:
            model: "default" (SmolLM2-135M-Instruct and the heads shipped for it, fetched when missing), a folder, a
                .gguf file or a hub id. Heads alone, in a folder or on the hub, stand for them and the base model they
                name.
            heads: a folder, file or hub id. None with another model: the Medusa-2 heads inside it, else plain
                decoding only.
            draft: where the guesses come from. "medusa": the heads. "prompt-lookup": what followed the last time the
                text said the same; needs no model. "first-layers:N": the model's own first N layers. A folder, .gguf
                file or hub id: a smaller model of the same tokenizer. All but "medusa" guess a chain.
            backend: "auto", "reference", "cpu", "cuda" or "triton".
            device: None is CUDA where `backend` can run there and a GPU is present, else the CPU.
            dtype: "float32", "bfloat16", "float16" (CUDA) or "int8" (CPU); None is "bfloat16". On the CPU bfloat16
                means bf16 weights and K/V with fp32 activations and sums.
            tree: "auto", a name (`Tree.names()`), choices, a Tree, or the most nodes it may have, the root counted; cut
                to what `draft` can fill. "dynamic-N": at each step the N nodes that the heads find most probable.
            max_seqlen: prompt + new tokens at most; None is min(context, 4096). It may exceed the context as far as the
                checkpoint's RoPE scaling extends it, and never a sliding window.
            bitwise: on a GPU too, a greedy step's logits are plain decoding's bit for bit, and so is the text: with
                bf16 and fp16, attention then leaves the tensor cores. On the CPU they always are.

        Raises:
            ValueError: an option, or a checkpoint, is not as above; the message names it. TypeError: a tree's choices.
            ModelFetchError: the default model is not in the cache and could not be put there.
        """
        uses_heads = draft == "medusa"
        if heads is not None and not uses_heads:
            raise ValueError(f"heads are for draft='medusa'; with draft={draft!r} they must be None")
        device = choose_device(device, backend)
        dtype = _dtype(dtype, device)
        named, model = os.fspath(model), fetched(model)
        if named == "default" and heads is None:
            heads = DEFAULT_HEADS if uses_heads else None
        elif is_heads_only(model):
            if heads is not None:
                raise ValueError(f"model {named!r} holds only Medusa heads, so heads must be None")
            heads, model = model if uses_heads else None, base_model_of(model)
            if model is None:
                raise ValueError(f"model {named!r} holds only Medusa heads and names no base_model_name_or_path")
        checkpoint = open_checkpoint(model)
        config = checkpoint.config
        max_seqlen = _max_seqlen(max_seqlen, checkpoint)
        sizes = {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size}
        if heads is not None:
            found = load_heads(heads, **sizes)
        elif uses_heads and (names := checkpoint.medusa_names()):
            tensors = {name: checkpoint.tensor(name) for name in names}
            beside = read_json_if_any(checkpoint.path / "config.json")
            found = heads_from_tensors(tensors, beside, source=str(checkpoint.path), **sizes)
        else:
            found = None
        positions = max_seqlen + SPARE_POSITIONS
        built = Model(checkpoint, backend=backend, device=device, dtype=dtype, max_positions=positions, bitwise=bitwise)
        return cls(checkpoint, found, built, tree, max_seqlen, draft)

    def with_draft(
        self, draft: str | os.PathLike, *, tree: str | int | Sequence[Sequence[int]] | Tree = "auto"
    ) -> Medusa:
        """An engine on the same weights, not loaded again, with another source of guesses or another tree.

        Args:
            draft, tree: as `from_pretrained` takes them. "medusa" needs an engine that was loaded with its heads.

        Raises:
            ValueError: they are not as above.
        """
        if draft == "medusa" and self.heads is None:
            raise ValueError("draft 'medusa' needs Medusa heads, and this engine was loaded without")
        return type(self)(self._checkpoint, self.heads, self.model, tree, self.max_seqlen, draft)

    def tree(self, batch: int, medusa: bool = True) -> Tree | DynamicTree:
        """The tree that a batch of this size decodes with; the root alone is plain decoding."""
        if not medusa:
            return Tree.from_choices([])
        rows = cheap_rows(self.model.device)
        return choose_tree(self._tree, self.drafter, rows=rows, batch=batch)

    def encode(self, prompts: Prompt | Sequence[Prompt], chat: bool = True) -> tuple[bool, list[list[int]]]:
        """Whether there are many prompts, and the token ids of each, as `generate` takes them; raises as it does."""
        if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
            raise TypeError(
                f"prompts must be a str, a list of token ids, or a list of those, not {type(prompts).__name__}"
            )
        many = not isinstance(prompts, str) and not all(_is_integer(p) for p in prompts)
        listed = list(prompts) if many else [prompts]
        return many, [self._encode_one(p, f"prompts[{i}]" if many else "prompt", chat) for i, p in enumerate(listed)]

    def check(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        *,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool = False,
        medusa: bool = True,
        chat: bool = True,
        **sampling,
    ) -> None:
        """Raises the ValueError or TypeError that `generate` would for any of these prompts alone, without its work.

        Args:
            prompts: many; the rest is `generate`'s, sampling options one value each.
        """
        _, ids = self.encode(list(prompts), chat)
        options = SamplingOptions(**sampling)
        steps, _, _ = self._prepare([max(ids, key=len)], max_new_tokens, options, stop, ignore_eos, medusa)
        self._steps[medusa] = steps  # bound already, for the generation that follows

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 128,
        *,
        mode: str | Sequence[str] = "greedy",
        temperature: float | Sequence[float] = 1.0,
        top_p: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 0,
        posterior_threshold: float | Sequence[float] = 0.09,
        posterior_alpha: float | Sequence[float] = 0.3,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool = False,
        medusa: bool = True,
        chat: bool = True,
    ) -> Output:
        """Answers one prompt, or many at once.

        Args:
            prompts: a str or a flat list of token ids is one prompt; a list of strs or of lists is many, even of
                length 1. A str goes through the checkpoint's chat template if it has one; ids are taken as they are.
            max_new_tokens: at least 1; with the longest prompt at most `max_seqlen`.
            mode, temperature, top_p, top_k, posterior_threshold, posterior_alpha: see `medusa_kernels.verify_tree`; one
                value, or one per prompt.
            seed: an int or one per prompt; a sequence's tokens depend on its seed and its prompt alone.
            stop: a string or several; the text ends before the first one that appears.
            ignore_eos: go on after an end-of-sequence token.
            medusa: False is plain autoregressive decoding by the same kernels, without guesses from any source.
            chat: False leaves out the chat template.

        Returns:
            An `Output`: str, list of ids and finish reason for one prompt, lists of them for many, and `Stats`.

        Raises:
            ValueError, TypeError: an argument is not as above, before any work.
        """
        many, ids = self.encode(prompts, chat)
        options = SamplingOptions(mode, temperature, top_p, top_k, posterior_threshold, posterior_alpha, seed)
        steps, acceptance, transcripts = self._prepare(ids, max_new_tokens, options, stop, ignore_eos, medusa)
        stats = [Stats() for _ in ids]
        watch = Stopwatch()
        brought = rounds(steps, ids, acceptance, transcripts, max_new_tokens)
        next(brought)
        prefill_seconds = watch.lap()
        for step in brought:
            elapsed = watch.elapsed()
            for one, emitted in zip(stats, step.emitted, strict=True):
                if emitted:
                    one.steps += 1
                    one.accepted += emitted
                    one.decode_seconds = elapsed
        for one, transcript in zip(stats, transcripts, strict=True):
            one.new_tokens, one.prefill_seconds = len(transcript.token_ids), prefill_seconds
        self._steps[medusa] = steps
        total = Stats.of_many(stats, prefill_seconds, max(s.decode_seconds for s in stats))
        fields = [
            [t.text for t in transcripts],
            [t.token_ids for t in transcripts],
            [t.finish_reason for t in transcripts],
        ]
        return Output(*(f if many else f[0] for f in fields), total if many else stats[0])

    def stream(self, prompt: Prompt, max_new_tokens: int = 128, **options) -> Iterator[Chunk]:
        """Answers one prompt chunk by chunk: the prefill's token, then one chunk a step. Takes `generate`'s options.

        The chunks' texts join to `generate`'s text. Raises as `generate` does, at once.
        """
        extra = {name: options.pop(name, default) for name, default in _STREAM_DEFAULTS.items()}
        if unknown := options.keys() - SamplingOptions.__dataclass_fields__.keys():
            raise TypeError(f"stream() got an unexpected keyword argument {min(unknown)!r}")
        many, ids = self.encode(prompt, extra.pop("chat"))
        if many:
            raise ValueError("stream takes one prompt: a str or a flat list of token ids")
        steps, acceptance, (transcript,) = self._prepare(ids, max_new_tokens, SamplingOptions(**options), **extra)
        brought = rounds(steps, ids, acceptance, [transcript], max_new_tokens)
        return self._chunks(brought, steps, extra["medusa"])

    def _chunks(self, brought: Iterator[Round], steps: Steps, medusa: bool) -> Iterator[Chunk]:
        for step in brought:
            (text,), (gained,), (emitted,) = step.texts, step.gained, step.emitted
            yield Chunk(text, gained, emitted - 1)
        self._steps[medusa] = steps

    def _prepare(self, ids, max_new_tokens, options: SamplingOptions, stop, ignore_eos, medusa):
        if not _is_integer(max_new_tokens) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be an int of at least 1, not {max_new_tokens!r}")
        max_new_tokens, longest = int(max_new_tokens), max(map(len, ids))
        if longest + max_new_tokens > self.max_seqlen:
            raise ValueError(
                f"prompt of {longest} tokens + max_new_tokens {max_new_tokens} exceeds max_seqlen {self.max_seqlen}"
            )
        if medusa and self.drafter is None:
            raise ValueError(
                "this model has no Medusa heads: pass heads=... to from_pretrained, or medusa=False here (on the "
                "command line --heads or --no-medusa)"
            )
        stop = [stop] if isinstance(stop, str) else [] if stop is None else stop
        if not isinstance(stop, Sequence) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop must be a non-empty string or several, not {stop!r}")
        if stop and self.tokenizer.missing_because:
            raise ValueError(f"stop needs text: {self.tokenizer.missing_because}")
        acceptance = options.acceptance(len(ids), self.model.device)
        eos = () if ignore_eos else self._eos
        transcripts = [
            Transcript(self.tokenizer, eos_token_ids=eos, stop=stop, max_new_tokens=max_new_tokens) for _ in ids
        ]
        # What typical acceptance takes depends on the tree, and a text must not depend on how many others there are.
        tree = self.tree(1 if "typical" in options.mode else len(ids), medusa)
        return self._take_steps(len(ids), longest + max_new_tokens, tree, medusa), acceptance, transcripts

    def _take_steps(self, batch: int, seqlen: int, tree: Tree | DynamicTree, medusa: bool) -> Steps:
        """A decoder's steps for this batch: the last ones of their kind if they fit, since binding takes a moment.

        The caller puts them back into `_steps` at the end, so that streams that take turns have a decoder each.
        """
        kept = self._steps.pop(medusa, None)
        if kept is not None:
            decoder = kept.decoder
            if decoder.batch == batch and decoder.max_seqlen >= seqlen and decoder.tree == tree:
                return kept
            del decoder
        del kept  # its cache goes before the next one comes
        rows = min(self.max_seqlen, -(-seqlen // 256) * 256)
        ahead = RUN_AHEAD if self._gpu else 0
        decoder = Decoder(self.model, self.drafter, tree, batch=batch, max_seqlen=rows, run_ahead=ahead)
        return steps_of(decoder, self._gpu)

    def _encode_one(self, prompt: Prompt, name: str, chat: bool) -> list[int]:
        is_ids = isinstance(prompt, Sequence) and not isinstance(prompt, bytes) and all(_is_integer(t) for t in prompt)
        if not isinstance(prompt, str) and not is_ids:
            raise TypeError(f"{name} must be a str or a list of token ids, not {prompt!r:.80}")
        if not len(prompt):
            raise ValueError(f"{name} is empty")
        if not isinstance(prompt, str):
            ids = [int(t) for t in prompt]
        else:
            ids = self.tokenizer.encode_prompt(prompt, chat)
        if not ids:
            raise ValueError(f"{name} has no tokens: {prompt!r:.80}")
        vocab = self.model.config.vocab_size  # a tokenizer may know more: tokens added without rows in the embedding
        if bad := [t for t in ids if not 0 <= t < vocab]:
            raise ValueError(f"{name} holds token id {bad[0]}; ids must be between 0 and {vocab - 1}")
        return ids


_STREAM_DEFAULTS = {"stop": None, "ignore_eos": False, "medusa": True, "chat": True}


def _is_integer(value: object) -> bool:
    """Any integer, NumPy's too."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _dtype(dtype: str | None, device: torch.device) -> str:
    if dtype is None:
        return "bfloat16"
    allowed = [name for name in DTYPES if name != ("float16" if device.type == "cpu" else "int8")]
    if dtype not in allowed:
        raise ValueError(f"dtype on {device.type} must be one of {', '.join(map(repr, allowed))}, not {dtype!r}")
    return dtype


def _max_seqlen(max_seqlen: int | None, checkpoint: Checkpoint) -> int:
    config = checkpoint.config
    context, window = config.max_position_embeddings, config.sliding_window or math.inf
    if max_seqlen is None:
        return min(DEFAULT_MAX_SEQLEN, context, window)
    if not _is_integer(max_seqlen) or max_seqlen < 2:
        raise ValueError(f"max_seqlen must be an int of at least 2, not {max_seqlen!r}")
    for what, limit in (("its context", config.rope.reach(context)), ("its sliding window", window)):
        if max_seqlen > limit:
            raise ValueError(f"max_seqlen {max_seqlen} is more than the model allows: {what} is {limit}")
    return int(max_seqlen)
