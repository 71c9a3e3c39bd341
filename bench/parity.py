"""Does Medusa say what plain decoding says, and what transformers says? `python -m bench.parity --help`.

`medusa verify` with one tree after another, as results rows: greedy texts of every prompt, and every first difference
judged by `medusa_engine.divergence`. Transformers is asked once, with `--transformers`. A large tree takes a CPU
most of an hour; `--skip` and `--limit` cut the prompts into runs with a row each.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from medusa_engine import Medusa
from medusa_engine.benchmark import append_row, load_prompts, where
from medusa_engine.cli_options import parse_tree
from medusa_engine.divergence import BITWISE, EQUAL, EXIT_CODES, VERDICTS, Transformers, report, verify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", default="chat", help="chat, humaneval, text files, or several with commas between")
    parser.add_argument("--skip", type=int, default=0, help="prompts to leave out at the beginning")
    parser.add_argument("--limit", type=int, default=100, help="prompts to take after those")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--trees", default="16", help="numbers of nodes or names, separated by commas")
    parser.add_argument("--batch", type=int, default=10, help="prompts decoded at once")
    parser.add_argument("--transformers", action="store_true", help="compare with transformers too")
    parser.add_argument("--output", type=Path, help="append a results row per tree to this JSONL file")
    args = parser.parse_args()

    if args.skip < 0 or args.limit < 1:
        parser.error("--skip must be at least 0, and --limit at least 1")
    texts = [text for name in args.prompts.split(",") for text in load_prompts(name)][args.skip :][: args.limit]
    if not texts:
        parser.error(f"no prompts are left of {args.prompts} behind the first {args.skip}")
    engine = Medusa.from_pretrained(dtype=args.dtype, backend=args.backend)
    theirs = Transformers("default", engine) if args.transformers else None
    verdicts = []
    for tree in args.trees.split(","):
        one = engine.with_draft("medusa", tree=parse_tree(tree))
        result = verify(one, texts, args.max_new_tokens, transformers=theirs, batch=args.batch)
        print(f"{engine.backend} {engine.dtype}, tree {tree}\n{report(result, texts)}", flush=True)
        if args.output:
            append_row(args.output, row(result, args.prompts, args.skip, tree, engine.model.device))
        verdicts.append(result["verdict"])
        theirs = None
    sys.exit(EXIT_CODES[max(verdicts, key=VERDICTS.index)])


def row(result: dict, prompts: str, skip: int, tree: str, device: torch.device) -> dict:
    """What `verify` returned, as a results row."""
    against = result["against"]
    settings = ("num_prompts", "max_new_tokens", "backend", "dtype", "tree_nodes")
    made = {
        "benchmark": "parity",
        "prompts": prompts,
        "skip": skip,
        **{name: result[name] for name in settings},
        "tree": tree,
        "bitwise_equal_to_plain": against["medusa"][BITWISE],
        "equal_to_plain": against["medusa"][BITWISE] + against["medusa"][EQUAL],
        "differences": result["differences"],
    }
    if theirs := against.get("transformers"):
        made["equal_to_transformers"] = theirs[BITWISE] + theirs[EQUAL]
        made["max_relative_logit_error"] = theirs["max_logit_error"]
    return made | where(device)


if __name__ == "__main__":
    main()
