"""Does text sampled through guesses follow the model's own distribution? `python -m bench.losslessness --help`.

Three proofs, on real weights:

- equal: with the same seed, Medusa's text is plain sampling's, token for token.
- uniform: a token's place in the model's distribution at its position, the tokens by falling probability and the place
  drawn evenly from the token's own share, is uniform on [0, 1] (Rosenblatt, "Remarks on a multivariate
  transformation", 1952). Chi-square over even bins, over the tokens of whole texts.
- outcomes: how often each whole short output comes, against its exact probability under the model; outputs are told
  apart up to their first token that is none of the likeliest. Chi-square, and the total variation distance against what
  chance allows.

A control goes through the last two: typical acceptance, which takes a likely guess more often than the model would say
it. A test that lets it pass proves nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bench.quality import read_logits
from medusa_engine import Medusa
from medusa_engine.benchmark import append_row, load_prompts, where
from medusa_engine.cli_options import parse_tree
from medusa_kernels.reference.sampling import kept_weights

BINS = 50
LEAST_EXPECTED = 5.0  # in a cell of a chi-square test; smaller ones are joined
SIGNIFICANCE = 1e-3  # a smaller p-value fails a test
OPENING = 6  # words of a prompt that a short output continues
LENGTH, RANKS = 4, 3  # of a short output: its tokens, and the likeliest ones told apart: 121 outcomes
OTHER = -1  # in an outcome: none of the likeliest
CONTROL = {"mode": "typical", "posterior_threshold": 0.02}
BATCH = 64

Outcome = tuple[int, ...]


def chi_square(*samples: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Pearson's test of independent samples: (seen, expected) each, counts (cells,) of one sum.

    Returns:
        `cells` after the rare ones of a sample were joined, `chi_square`, and `p_value` at cells - samples degrees of
        freedom.
    """
    cells, statistic = 0, 0.0
    for seen, expected in samples:
        seen, expected = seen.double(), expected.double()
        rare = expected < LEAST_EXPECTED
        if rare.any():
            seen, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (seen, expected))
        cells += len(seen)
        statistic += float(((seen - expected) ** 2 / expected).sum())
    half = torch.tensor([cells - len(samples), statistic], dtype=torch.float64) / 2
    return {"cells": cells, "chi_square": statistic, "p_value": float(torch.special.gammaincc(*half))}


def total_variation(seen: Tensor, probabilities: Tensor) -> dict[str, float]:
    """The distance of the frequencies from the probabilities, and what chance exceeds less often than SIGNIFICANCE.

    The bound is the mean's, sum sqrt(p (1 - p) / n) / 2 at most, and McDiarmid's above it, since one sample moves the
    distance by 1 / n at most: sqrt(ln(1 / SIGNIFICANCE) / (2 n)).
    """
    n, p = float(seen.sum()), probabilities.double()
    mean = float((p * (1 - p) / n).sqrt().sum()) / 2
    return {
        "total_variation": float((seen / n - p).abs().sum()) / 2,
        "bound": mean + math.sqrt(math.log(1 / SIGNIFICANCE) / (2 * n)),
    }


def places(weights: Tensor, tokens: Sequence[int], generator: torch.Generator) -> Tensor:
    """Where in its distribution each token stands: fp64 (tokens,), uniform if they were drawn from `weights` (tokens,
    vocab). A token that cannot be drawn has no place: NaN.
    """
    weights = weights.double()
    own = weights.gather(1, torch.tensor(tokens)[:, None])
    above = (weights * (weights > own)).sum(1)
    # Tokens of equal weight share a stretch, and each draws from all of it.
    tied = (weights * (weights == own)).sum(1)
    place = (above + torch.rand(len(tokens), generator=generator, dtype=torch.float64) * tied) / weights.sum(1)
    return place.where(own[:, 0] > 0, torch.nan)


def uniform(places: Tensor) -> dict[str, float]:
    """The chi-square test of `places`; one that is NaN fails it outright."""
    seen = places.nan_to_num(2.0).histc(BINS, 0.0, 1.0)
    if places.isnan().any():
        return {"tokens": len(places), "cells": BINS, "chi_square": math.inf, "p_value": 0.0}
    return {"tokens": len(places), **chi_square((seen, torch.full((BINS,), len(places) / BINS)))}


def text_weights(engine: Medusa, prompt: list[int], ids: list[int], cut: Mapping[str, float]) -> Tensor:
    """What each of `ids` should have been drawn from, unscaled: fp32 (ids, vocab)."""
    read = torch.tensor([*prompt, *ids[:-1]], dtype=torch.int32)
    logits = torch.cat(list(read_logits(engine.model, read)))[len(prompt) - 1 :]
    return torch.stack([kept_weights(row, **cut) for row in logits])


def outcomes(engine: Medusa, prompt: list[int], cut: Mapping[str, float]) -> dict[Outcome, float]:
    """Every outcome of LENGTH tokens and its probability: RANKS tokens a position, or one that is OTHER and ends it."""
    ended: dict[Outcome, float] = {}
    going: dict[Outcome, float] = {(): 1.0}
    for _ in range(LENGTH):
        grown = {}
        for text, p in going.items():
            weights = text_weights(engine, [*prompt, *text], [0], cut)[0].double()
            shares, tokens = (weights / weights.sum()).topk(min(RANKS, int((weights > 0).sum())))
            grown |= {(*text, token): p * q for token, q in zip(tokens.tolist(), shares.tolist(), strict=True)}
            ended[(*text, OTHER)] = p * max(0.0, 1 - float(shares.sum()))
        going = grown
    return ended | going


def count(texts: Sequence[list[int]], probabilities: Mapping[Outcome, float]) -> Tensor:
    """How many texts have each outcome, fp64, in the order of `probabilities`."""
    seen = dict.fromkeys(probabilities, 0)
    for text in map(tuple, texts):
        cut = next((i for i in range(LENGTH) if (*text[:i], OTHER) in seen and not _goes_on(text[: i + 1], seen)), None)
        seen[text if cut is None else (*text[:cut], OTHER)] += 1
    return torch.tensor(list(seen.values()), dtype=torch.float64)


def _goes_on(text: Outcome, seen: Mapping[Outcome, int]) -> bool:
    return text in seen or (*text, OTHER) in seen


def prove_uniform(engine: Medusa, prompts: list[str], seeds: int, tokens: int, cut, options) -> dict[str, float]:
    """Samples `seeds` texts of each prompt by `options` and tests their places."""
    tokenizer, found, generator = engine.tokenizer, [], torch.Generator().manual_seed(0)
    for i, prompt in enumerate(tqdm(prompts, desc=f"uniform, {options['mode']}", disable=None)):
        ids = tokenizer.encode_prompt(prompt)
        own = list(range(i * seeds, (i + 1) * seeds))  # texts of one seed would be drawn by the same numbers
        for text in engine.generate([ids] * seeds, tokens, seed=own, **options, **cut).token_ids:
            found.append(places(text_weights(engine, ids, text, cut), text, generator))
    return uniform(torch.cat(found))


def prove_outcomes(
    engine: Medusa, openings: Sequence[list[int]], exact: Sequence[Mapping[Outcome, float]], samples: int, cut, options
) -> dict[str, float]:
    """Samples `samples` short outputs after each opening by `options` and counts them."""
    counted = []
    for i, (opening, probabilities) in enumerate(zip(openings, exact, strict=True)):
        texts, end = [], (i + 1) * samples
        for first in tqdm(range(i * samples, end, BATCH), desc=f"outcomes, {options['mode']}", disable=None):
            seeds = list(range(first, min(first + BATCH, end)))
            batch = engine.generate([opening] * len(seeds), LENGTH, seed=seeds, ignore_eos=True, **options, **cut)
            texts += batch.token_ids
        expected = samples * torch.tensor(list(probabilities.values()), dtype=torch.float64)
        counted.append((count(texts, probabilities), expected))
    seen, expected = (torch.cat(parts) for parts in zip(*counted, strict=True))
    return {
        "samples": int(seen.sum()),
        "outcomes": len(seen),
        **chi_square(*counted),
        **total_variation(seen, expected / expected.sum()),
    }


def count_equal(engine: Medusa, prompts: list[str], tokens: int, options: Mapping) -> int:
    """Prompts whose seeded text is the same with guesses and without."""
    texts = [
        [
            engine.generate(p, tokens, seed=i, medusa=medusa, **options).token_ids
            for i, p in enumerate(tqdm(prompts, desc="equal", disable=None))
        ]
        for medusa in (True, False)
    ]
    return sum(fast == plain for fast, plain in zip(*texts, strict=True))


def failures(row: Mapping) -> list[str]:
    """What speaks against losslessness, or against the tests; empty if all is well."""
    found = []
    if row["equal_texts"] != row["num_prompts"]:
        found.append(f"{row['num_prompts'] - row['equal_texts']} seeded texts differ from plain sampling's")
    for test in ("uniform", "outcomes"):
        if row[test]["p_value"] < SIGNIFICANCE:
            found.append(f"{test}: p = {row[test]['p_value']:.1e}, less than {SIGNIFICANCE}")
        if row["control"][test]["p_value"] >= SIGNIFICANCE:
            found.append(f"{test} lets the biased control pass: p = {row['control'][test]['p_value']:.1e}")
    if row["outcomes"]["total_variation"] > row["outcomes"]["bound"]:
        found.append("outcomes: the total variation distance is more than chance allows")
    if row["control"]["outcomes"]["total_variation"] <= row["control"]["outcomes"]["bound"]:
        found.append("outcomes: the biased control's total variation distance is within the bound")
    return found


def table(row: Mapping) -> str:
    lines = [f"{row['num_prompts']} prompts, {row['device']}, {row['backend']} {row['dtype']}, tree {row['tree']}"]
    lines += [f"  equal     {row['equal_texts']} of {row['num_prompts']} seeded texts are plain sampling's"]
    for name, tests in (("lossless", row), ("control", row["control"])):
        u, o = tests["uniform"], tests["outcomes"]
        lines.append(
            f"  uniform   {name:8}  {u['tokens']} tokens, {u['cells']} bins: chi-square {u['chi_square']:.1f}, "
            f"p {u['p_value']:.2g}"
        )
        lines.append(
            f"  outcomes  {name:8}  {o['samples']} samples, {o['cells']} cells: chi-square {o['chi_square']:.1f}, "
            f"p {o['p_value']:.2g}; total variation {o['total_variation']:.4f}, bound {o['bound']:.4f}"
        )
    return "\n".join(lines)


def measure(engine: Medusa, prompts: list[str], *, tokens: int, seeds: int, openings: int, samples: int, cut) -> dict:
    """All proofs and their control.

    Args:
        tokens, seeds: new tokens of a text, and texts per prompt, for `uniform`.
        openings, samples: starts of prompts, and outputs of each, for `outcomes`.
        cut: temperature, top_p and top_k.
    """
    starts = [engine.tokenizer.encode(" ".join(p.split()[:OPENING])) for p in prompts[:openings]]
    exact = [outcomes(engine, start, cut) for start in starts]
    lossless = {"mode": "lossless"}
    tested = [
        {
            "uniform": prove_uniform(engine, prompts, seeds, tokens, cut, options),
            "outcomes": prove_outcomes(engine, starts, exact, samples, cut, options),
        }
        for options in (lossless, CONTROL)
    ]
    return {
        "num_prompts": len(prompts),
        "max_new_tokens": tokens,
        "equal_texts": count_equal(engine, prompts, tokens, {**lossless, **cut}),
        **tested[0],
        "control": {**CONTROL, **tested[1]},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", default="chat", help="chat, humaneval or a text file")
    parser.add_argument("--limit", type=int, default=20, help="prompts at most")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=4, help="texts per prompt")
    parser.add_argument("--openings", type=int, default=3, help="prompts whose short outputs are counted")
    parser.add_argument("--samples", type=int, default=1024, help="short outputs per opening")
    parser.add_argument("--tree", default="16", help="a number of nodes or a name")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--output", type=Path, help="append the results row to this JSONL file")
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args(argv)
    engine = Medusa.from_pretrained(dtype=args.dtype, backend=args.backend, tree=parse_tree(args.tree))
    cut = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    sizes = {"tokens": args.max_new_tokens, "seeds": args.seeds, "openings": args.openings, "samples": args.samples}
    row = {
        "benchmark": "losslessness",
        "prompts": args.prompts,
        "backend": engine.backend,
        "dtype": engine.dtype,
        "tree": args.tree,
        **cut,
        **measure(engine, load_prompts(args.prompts)[: args.limit], **sizes, cut=cut),
        **where(engine.model.device),
    }
    print(json.dumps(row) if args.as_json else table(row))
    if args.output:
        append_row(args.output, row)
    if found := failures(row):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
