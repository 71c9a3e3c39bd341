"""What temperature does to Medusa: `python -m bench.sampling --help`.

Every acceptance mode at every temperature with every tree, all with the same prompts and seeds, prompt by prompt so
that a slow moment hits all: tokens per step, tokens per second, and how many texts are plain sampling's own.

A guess stands before the model's token is drawn. So no lossless rule takes a guess more often than the model would say
it: the share of a node's probability that its children hold is the best there is, and the draw that `verify_tree`
makes reaches it. What a temperature costs is what it takes from the likeliest tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from medusa_engine import Medusa
from medusa_engine.benchmark import append_row, load_prompts, where
from medusa_engine.cli_options import parse_tree
from medusa_engine.output import Output

TREES = ("chain-4", "16", "64", "dynamic-16", "dynamic-64")
SETTINGS = (
    {"mode": "greedy"},
    {"mode": "lossless", "temperature": 0.7},
    {"mode": "lossless", "temperature": 1.0},
    {"mode": "typical", "temperature": 0.7},
    {"mode": "typical", "temperature": 1.0},
)


def measure(engines: Mapping[str, Medusa], prompts: Sequence[str], max_new_tokens: int) -> list[dict]:
    """An entry per setting and tree. `engines`: one for each tree, of one model.

    Returns:
        `tokens_per_step` over all prompts; `of_greedy`, its ratio to the greedy one of the same tree;
        `tokens_per_second` and `speedup` over plain decoding in the same setting, medians over the prompts;
        `equal_texts`, the prompts answered as by plain decoding with the same seed, which typical acceptance does not
        promise.
    """
    one = next(iter(engines.values()))
    for engine in engines.values():
        engine.generate(prompts[0], 8)
    plain: list[list[Output]] = [[] for _ in SETTINGS]
    fast: dict[tuple[int, str], list[Output]] = {(i, name): [] for i in range(len(SETTINGS)) for name in engines}
    for seed, prompt in enumerate(tqdm(prompts, desc="prompts", disable=None)):
        for i, setting in enumerate(SETTINGS):
            plain[i].append(one.generate(prompt, max_new_tokens, seed=seed, medusa=False, **setting))
            for name, engine in engines.items():
                fast[i, name].append(engine.generate(prompt, max_new_tokens, seed=seed, **setting))
    entries = []
    for (i, name), outputs in fast.items():
        timed = [(p.stats, f.stats) for p, f in zip(plain[i], outputs, strict=True) if f.stats.steps]
        steps = sum(f.steps for _, f in timed)
        entries.append(
            {
                "mode": SETTINGS[i]["mode"],
                "temperature": SETTINGS[i].get("temperature", 0.0),
                "tree": name,
                "tree_nodes": engines[name].tree(1).num_nodes,
                "new_tokens": sum(f.new_tokens for _, f in timed),
                "steps": steps,
                "tokens_per_step": sum(f.accepted for _, f in timed) / steps,
                "tokens_per_second": statistics.median(f.tokens_per_second for _, f in timed),
                "speedup": statistics.median(f.tokens_per_second / p.tokens_per_second for p, f in timed),
                "equal_texts": sum(p.token_ids == f.token_ids for p, f in zip(plain[i], outputs, strict=True)),
            }
        )
    greedy = {e["tree"]: e["tokens_per_step"] for e in entries if e["mode"] == "greedy"}
    return [e | {"of_greedy": e["tokens_per_step"] / greedy[e["tree"]]} for e in entries]


def table(row: Mapping) -> str:
    count = row["num_prompts"]
    lines = [
        f"{count} prompts ({row['prompts']}), {row['max_new_tokens']} new tokens each, "
        f"{row['device']}, {row['backend']} {row['dtype']}",
        "  mode      temperature  tree        nodes  tokens/step  of greedy  tokens/s  speedup  equal texts",
    ]
    line = "  {mode:9} {temperature:11.1f}  {tree:10} {tree_nodes:6} {tokens_per_step:12.3f} {of_greedy:10.0%}"
    line += " {tokens_per_second:9.1f} {speedup:7.2f}x  {equal_texts} of {count}"
    return "\n".join(lines + [line.format(**entry, count=count) for entry in row["entries"]])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", default="chat", help="chat, humaneval or a text file")
    parser.add_argument("--limit", type=int, default=20, help="prompts at most")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--trees", default=",".join(TREES), help="names or numbers of nodes, separated by commas")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--output", type=Path, help="append the results row to this JSONL file")
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args(argv)
    first, *others = args.trees.split(",")
    engine = Medusa.from_pretrained(dtype=args.dtype, backend=args.backend, tree=parse_tree(first))
    engines = {first: engine, **{name: engine.with_draft("medusa", tree=parse_tree(name)) for name in others}}
    row = {
        "benchmark": "sampling",
        "prompts": args.prompts,
        "num_prompts": min(args.limit, len(load_prompts(args.prompts))),
        "max_new_tokens": args.max_new_tokens,
        "backend": engine.backend,
        "dtype": engine.dtype,
        "entries": measure(engines, load_prompts(args.prompts)[: args.limit], args.max_new_tokens),
        **where(engine.model.device),
    }
    print(json.dumps(row) if args.as_json else table(row))
    if args.output:
        append_row(args.output, row)


if __name__ == "__main__":
    main()
