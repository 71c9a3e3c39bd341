"""Do two ways of decoding say the same, and if not, is it rounding or a bug? `medusa verify` is this file's door.

Greedy texts of the same prompts by plain decoding, by Medusa and, on request, by transformers, each with the logits
that its tokens were chosen from. Up to the first token that differs both read the same text, so their logits there can
be compared row by row: what rounding cannot explain is a bug, even if the tokens happen to agree.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoint import fetched, open_checkpoint
from .engine import Medusa
from .heads_files import base_model_of, is_heads_only
from .observe import moments

BITWISE, EQUAL, NEAR_TIE, BUG = "bitwise equal", "equal", "near-tie", "bug"
VERDICTS = (BITWISE, EQUAL, NEAR_TIE, BUG)
EXIT_CODES = {BITWISE: 0, EQUAL: 0, NEAR_TIE: 3, BUG: 1}

# How far apart two correct engines' logits may be, as a share of the row's largest |logit|. Measured on SmolLM2's chat
# prompts against transformers: 5.6e-6 in float32, 1.2e-2 in bfloat16 (a 16-bit cache); float16 is 8 times finer.
ROUNDING = {"float32": 5e-5, "bfloat16": 5e-2, "float16": 6e-3}


@dataclass(frozen=True)
class Run:
    """One greedy text.

    Attributes:
        token_ids: with the EOS that ended it.
        logits: per token fp32 (vocab,), what it was chosen from; None where an engine does not show it.
    """

    token_ids: list[int]
    logits: list[Tensor | None]


@dataclass(frozen=True)
class Comparison:
    """What became of one prompt.

    Attributes:
        verdict: one of VERDICTS, mildest first.
        position, tokens: of the first difference: index among the new tokens, and the token of each run there, None
            for a run that had ended. None and () if the token ids are equal.
        margin: how far apart the reference's logits of these two tokens are; None if one run had ended, or the
            reference does not show its logits there.
        logit_error: the largest |difference| of the logits over all positions read by both, each as a share of the
            row's largest |logit|.
    """

    verdict: str
    position: int | None
    tokens: tuple[int | None, ...]
    margin: float | None
    logit_error: float


def judge(reference: Run, other: Run, rounding: float) -> Comparison:
    """Compares two greedy texts of one prompt; `rounding` is the logit error that two correct engines may have.

    A first difference is a near-tie iff the logit error is within `rounding` and the two tokens' logits are within
    twice the error of their row: more than that no pair of argmaxes can differ by. Where `other` does not show that
    row, its error is taken to be `rounding`. Anything else is a bug: one side did not take its own best token, the
    logits are off, or a text ends where the other goes on.
    """
    expected, found = reference.token_ids, other.token_ids
    shared = min(len(expected), len(found))
    position = next((i for i in range(shared) if expected[i] != found[i]), shared)
    rows = list(zip(reference.logits[: position + 1], other.logits[: position + 1], strict=False))
    error = max((_relative_error(a, b) for a, b in rows if a is not None and b is not None), default=0.0)
    if expected == found:
        verdict = BUG if error > rounding else BITWISE if error == 0 else EQUAL
        return Comparison(verdict, None, (), None, error)
    tokens = tuple(ids[position] if position < len(ids) else None for ids in (expected, found))
    if None in tokens or rows[position][0] is None:
        return Comparison(BUG, position, tokens, None, error)
    row, others = rows[position]
    row = row.double()
    margin = float((row[tokens[0]] - row[tokens[1]]).abs())
    largest_error = rounding * row.abs().max() if others is None else (row - others.double()).abs().max()
    is_tie = error <= rounding and margin <= 2 * float(largest_error)
    return Comparison(NEAR_TIE if is_tie else BUG, position, tokens, margin, error)


def _relative_error(reference: Tensor, other: Tensor) -> float:
    if torch.equal(reference, other):
        return 0.0
    error = float((reference - other).abs().max() / reference.abs().max())
    return error if error == error else float("inf")  # a NaN is no rounding


def our_runs(engine: Medusa, prompts: Sequence[list[int]], max_new_tokens: int, *, medusa: bool) -> list[Run]:
    """The prompts decoded as one batch. The prefill keeps the first token's logits to itself."""
    rows: list[list[Tensor | None]] = [[None] for _ in prompts]
    for step, moment in enumerate(moments(engine, prompts, max_new_tokens, medusa=medusa)):
        if step == 0:
            continue
        for b, gained in enumerate(moment.gained):
            path = moment.decoder.accepted_nodes[b, : len(gained)].long()
            rows[b] += moment.decoder.logits[b].index_select(0, path).float().cpu().unbind()
    return [Run(t.token_ids, kept) for t, kept in zip(moment.transcripts, rows, strict=True)]


class Transformers:
    """The same checkpoint in transformers, at the same precision: what another engine's authors made of it."""

    def __init__(self, model: str | os.PathLike, engine: Medusa):
        """Loads what `from_pretrained(model)` loaded.

        Raises:
            ValueError: transformers is not installed, or cannot stand beside this checkpoint or dtype.
        """
        if engine.dtype not in ROUNDING:
            raise ValueError(f"transformers has no weights of dtype {engine.dtype!r} to compare with; use float32")
        model = fetched(model)
        path = open_checkpoint(base_model_of(model) if is_heads_only(model) else model).path
        if not path.is_dir():
            raise ValueError(f"{path}: comparing with transformers needs a model folder or a hub id, not a GGUF file")
        try:
            from transformers import AutoModelForCausalLM
        except ModuleNotFoundError:
            raise ValueError("comparing with transformers needs `pip install transformers`") from None
        device = engine.model.device
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, engine.dtype)).eval()
        # On the CPU a 16-bit dtype is that of our weights and our cache; activations and sums are fp32.
        self._model = loaded.float() if device.type == "cpu" else loaded.to(device)

    @torch.no_grad()
    def run(self, prompt: list[int], max_new_tokens: int) -> Run:
        ids = torch.tensor([prompt], device=self._model.device)
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = [row[0].float().cpu() for row in out.logits]
        return Run(out.sequences[0, len(prompt) :].tolist(), logits)


def own_rounding(engine: Medusa) -> float:
    """How far Medusa's logits may be from plain decoding's: where a row never depends on the rows beside it, as on the
    cpu backend or with bitwise=True, not at all; elsewhere as far as another engine's.
    """
    return 0.0 if engine.model.bitwise else ROUNDING[engine.dtype]


def verify(
    engine: Medusa,
    prompts: Sequence[str | list[int]],
    max_new_tokens: int,
    *,
    transformers: Transformers | None = None,
    batch: int = 1,
    chat: bool = True,
) -> dict[str, Any]:
    """Medusa against plain decoding, and plain decoding against transformers, over all prompts.

    Args:
        prompts: str or token ids, as `Medusa.generate` takes them with `chat`.
        batch: prompts that our engine decodes at once.

    Returns:
        A row for `bench/results` or `report`: the worst verdict of all; per opponent how many prompts got each verdict
        and the largest logit error; and every difference with its prompt's index, both tokens and their spelling.
    """
    _, ids = engine.encode(list(prompts), chat)
    found: dict[str, list[Comparison]] = {"medusa": []}
    if transformers is not None:
        found["transformers"] = []
    for group in tqdm(list(_groups(ids, batch)), desc="prompts", unit=f"x{batch}", disable=None):
        plain, medusa = (our_runs(engine, group, max_new_tokens, medusa=m) for m in (False, True))
        found["medusa"] += [judge(p, m, own_rounding(engine)) for p, m in zip(plain, medusa, strict=True)]
        if transformers is not None:
            theirs = (transformers.run(prompt, max_new_tokens) for prompt in group)
            found["transformers"] += [judge(t, p, ROUNDING[engine.dtype]) for t, p in zip(theirs, plain, strict=True)]
    comparisons = [c for each in found.values() for c in each]
    return {
        "verdict": max((c.verdict for c in comparisons), key=VERDICTS.index),
        "num_prompts": len(ids),
        "max_new_tokens": max_new_tokens,
        "backend": engine.backend,
        "dtype": engine.dtype,
        "tree_nodes": engine.tree(batch).num_nodes,
        "batch": batch,
        "against": {name: _summary(each) for name, each in found.items()},
        "differences": [
            {"prompt": i, "against": name, **asdict(c), "spelled": [_spell(engine, token) for token in c.tokens]}
            for name, each in found.items()
            for i, c in enumerate(each)
            if c.verdict in (NEAR_TIE, BUG)
        ],
    }


def _groups(ids: list[list[int]], batch: int) -> Iterator[list[list[int]]]:
    for start in range(0, len(ids), batch):
        yield ids[start : start + batch]


def _summary(comparisons: list[Comparison]) -> dict[str, Any]:
    counts = Counter(c.verdict for c in comparisons)
    return {v: counts[v] for v in VERDICTS} | {"max_logit_error": max(c.logit_error for c in comparisons)}


def _spell(engine: Medusa, token: int | None) -> str | None:
    return None if token is None else engine.tokenizer.decode([token], skip_special_tokens=False)


# Who is the reference and who is judged; a difference lists its tokens in this order.
SIDES = {"medusa": ("plain decoding", "Medusa"), "transformers": ("transformers", "plain decoding")}


def report(result: dict[str, Any], prompts: Sequence[str]) -> str:
    """What `verify` found, for people: a line per difference, a line per opponent."""
    lines = [_difference_line(d, prompts[d["prompt"]]) for d in result["differences"]]
    for name, counts in result["against"].items():
        shown = ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v])
        lines.append(
            f"{' and '.join(SIDES[name])}, {result['num_prompts']} prompts: {shown}; "
            f"largest logit error {counts['max_logit_error']:.1e} of the largest logit"
        )
    return "\n".join(lines)


def _difference_line(difference: dict[str, Any], prompt: str) -> str:
    head = f"{difference['verdict']}: prompt {difference['prompt']} ({prompt:.40}), "
    error = f"logit error {difference['logit_error']:.1e}"
    sides = SIDES[difference["against"]]
    if difference["position"] is None:
        return f"{head}{' and '.join(sides)}: equal tokens, {error}"
    told = zip(sides, difference["tokens"], difference["spelled"], strict=True)
    shown = ", ".join(f"{side} {'had ended' if token is None else f'{text!r} ({token})'}" for side, token, text in told)
    margin = "" if difference["margin"] is None else f"margin {difference['margin']:.2g}, "
    return f"{head}token {difference['position']}: {shown}; {margin}{error}"
