"""Does Medusa say what plain decoding says, and what transformers says? `python -m bench.parity --help`.

`medusa verify --transformers` in fp32, as a results row: three greedy texts per prompt, every first difference judged
by `medusa_engine.divergence`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from medusa_engine import Medusa
from medusa_engine.benchmark import append_row, load_prompts, where
from medusa_engine.cli import parse_tree
from medusa_engine.divergence import BITWISE, EQUAL, EXIT_CODES, Transformers, report, verify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", default="chat", help="chat, humaneval or a text file")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--tree", default="16", help="a number of nodes or a name")
    parser.add_argument("--batch", type=int, default=10, help="prompts decoded at once")
    parser.add_argument("--output", type=Path, help="append the results row to this JSONL file")
    args = parser.parse_args()

    engine = Medusa.from_pretrained(dtype="float32", backend=args.backend, tree=parse_tree(args.tree))
    texts = load_prompts(args.prompts)[: args.limit]
    theirs = Transformers("default", engine)
    result = verify(engine, texts, args.max_new_tokens, transformers=theirs, batch=args.batch)
    print(report(result, texts))
    if args.output:
        append_row(args.output, row(result, args.prompts))
    sys.exit(EXIT_CODES[result["verdict"]])


def row(result: dict, prompts: str) -> dict:
    """What `verify` returned, as a results row."""
    against = result["against"]
    settings = ("num_prompts", "max_new_tokens", "backend", "dtype", "tree_nodes")
    return {
        "benchmark": "parity",
        "prompts": prompts,
        **{name: result[name] for name in settings},
        "equal_to_plain": against["medusa"][BITWISE] + against["medusa"][EQUAL],
        "equal_to_transformers": against["transformers"][BITWISE] + against["transformers"][EQUAL],
        "differences": result["differences"],
        "max_relative_logit_error": against["transformers"]["max_logit_error"],
        **where(),
    }


if __name__ == "__main__":
    main()
