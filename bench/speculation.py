"""How often a draft model's guess would be kept when text is sampled: `python -m bench.speculation --help`.

At each position of text that the model sampled, p is the model's distribution and q that of its own first layers, the
draft. Three ways to guess, by the probability that the guess is kept, in mean over the positions:

- likeliest: the guess is q's mode, kept with its probability under p: what this engine does.
- same number: both draw by the inverse CDF from the position's uniform number; the guess is kept where the two draws
  agree: the overlap of each token's two intervals. It would leave a seeded text plain sampling's own as well.
- rejection: speculative sampling's rule (Leviathan et al., 2023), the most there is: the sum of min(p, q). Its text
  follows p too, and is no longer plain sampling's own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.quality import read_logits
from medusa_engine import Medusa
from medusa_engine.benchmark import append_row, load_prompts, where
from medusa_engine.draft_model import first_layers_of


def kept(p: Tensor, q: Tensor) -> dict[str, Tensor]:
    """The probability of each kind of guess, per row of float64 p and q (rows, vocab)."""
    p_end, q_end = p.cumsum(1), q.cumsum(1)
    overlap = torch.minimum(p_end, q_end) - torch.maximum(p_end - p, q_end - q)
    return {
        "likeliest": p.gather(1, q.argmax(1, keepdim=True))[:, 0],
        "same_number": overlap.clamp(min=0).sum(1),
        "rejection": torch.minimum(p, q).sum(1),
    }


def measure(
    engine: Medusa, prompts: Sequence[str], layers: Sequence[int], temperature: float, tokens: int
) -> list[dict]:
    """An entry per draft: the means, and how many positions they are over."""
    texts = []
    for seed, prompt in enumerate(prompts):
        ids = engine.tokenizer.encode_prompt(prompt)
        out = engine.generate(ids, tokens, mode="lossless", temperature=temperature, seed=seed)
        texts.append((len(ids), torch.tensor(ids + out.token_ids, dtype=torch.int32)))

    def distributions(model, start: int, text: Tensor) -> Tensor:
        logits = torch.cat(list(read_logits(model, text[:-1])))[start - 1 :]
        return (logits.double() / temperature).softmax(1)

    drafts = {count: first_layers_of(engine.model, count) for count in layers}
    found: dict[int, list[dict[str, Tensor]]] = {count: [] for count in layers}
    for start, text in texts:
        p = distributions(engine.model, start, text)
        for count, draft in drafts.items():
            found[count].append(kept(p, distributions(draft, start, text)))
    entries = []
    for count, parts in found.items():
        means = {name: float(torch.cat([part[name] for part in parts]).mean()) for name in parts[0]}
        positions = sum(len(part["rejection"]) for part in parts)
        entries.append({"draft": f"first-layers:{count}", "positions": positions, **means})
    return entries


def table(row: dict) -> str:
    lines = [f"{row['dtype']}, temperature {row['temperature']}, {row['num_prompts']} prompts: share of guesses kept"]
    lines.append(f"{'draft':>16}  {'likeliest':>9}  {'same number':>11}  {'rejection':>9}")
    for e in row["entries"]:
        lines.append(f"{e['draft']:>16}  {e['likeliest']:9.3f}  {e['same_number']:11.3f}  {e['rejection']:9.3f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=10, help="prompts of the chat set")
    parser.add_argument("-n", "--max-new-tokens", type=int, default=64)
    parser.add_argument("--layers", default="8,20,28", help="of the draft, separated by commas")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, help="append the results row to this JSONL file")
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args(argv)
    engine = Medusa.from_pretrained(dtype=args.dtype)
    prompts = load_prompts("chat")[: args.limit]
    layers = [int(count) for count in args.layers.split(",")]
    row = {
        "benchmark": "speculation",
        "num_prompts": len(prompts),
        "max_new_tokens": args.max_new_tokens,
        "dtype": engine.dtype,
        "temperature": args.temperature,
        "entries": measure(engine, prompts, layers, args.temperature, args.max_new_tokens),
        **where(engine.model.device),
    }
    print(json.dumps(row) if args.as_json else table(row))
    if args.output:
        append_row(args.output, row)


if __name__ == "__main__":
    main()
