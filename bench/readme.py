"""The README's tables, made from bench/results: `python -m bench.readme` writes them, a test holds the two together.

A table stands in the README between `<!-- results: NAME -->` and `<!-- /results -->`; TABLES lists the names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)

# What tells two rows of a benchmark apart. Of those that agree, the newest counts.
KEYS = {
    "decoding": ("device", "prompts", "backend", "dtype", "tree_nodes"),
    "drafts": ("device", "prompts", "backend", "dtype"),
    "losslessness": ("device", "prompts", "backend", "dtype", "tree", "temperature"),
    "peers": ("device", "engine", "mode", "precision"),
    "sampling": ("device", "prompts", "backend", "dtype"),
}


def rows(benchmark: str) -> list[dict]:
    """The newest row of each key, in the order of the files."""
    newest: dict[tuple, dict] = {}
    for path in sorted((ROOT / "bench" / "results").glob("*.jsonl")):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if row["benchmark"] == benchmark:
                key = tuple(row[name] for name in KEYS[benchmark])
                newest.pop(key, None)
                newest[key] = row
    return list(newest.values())


def decoding() -> str:
    """One table per device."""
    found, parts = rows("decoding"), []
    for device in dict.fromkeys(row["device"] for row in found):
        mine = [row for row in found if row["device"] == device]
        speeds = ("plain, tokens/s", "Medusa, tokens/s", "speedup")
        head = ("prompts", "weights", "tree", "tokens/step", *speeds, "equal texts")
        lines = [
            (
                f"{r['num_prompts']} {r['prompts']}",
                r["dtype"],
                f"{r['tree_nodes']} nodes",
                f"{r['tokens_per_step']:.2f}",
                f"{r['plain_tokens_per_second']:.0f}",
                f"{r['medusa_tokens_per_second']:.0f}",
                f"{r['speedup']:.2f}×",
                f"{r['equal_texts']} of {r['num_prompts']}",
            )
            for r in mine
        ]
        title = f"On {device}, {mine[0]['backend']} backend, {mine[0]['max_new_tokens']} new tokens a prompt:"
        parts.append(f"{title}\n\n{_markdown(head, lines)}\n\n{_made(mine[-1])}")
    return "\n\n".join(parts)


def peers() -> str:
    """One table per device: all engines, the fastest first."""
    every, parts = rows("peers"), []
    for device in dict.fromkeys(row["device"] for row in every):
        found = sorted((r for r in every if r["device"] == device), key=lambda r: -r["tokens_per_second"])
        lines = [
            (
                _engine(r),
                r["precision"],
                f"{r['tokens_per_second']:.0f}",
                f"{r['times_best_peer_of_same_bits']:.2f}×",
            )
            for r in found
        ]
        head = ("engine", "weights", "tokens/s", "over the best other engine of as many bits")
        title = f"On {device}, {found[0]['num_prompts']} {found[0]['prompts']} prompts:"
        parts.append(f"{title}\n\n{_markdown(head, lines)}\n\n{_made(found[0])}")
    return "\n\n".join(parts)


def _engine(row: dict) -> str:
    if row["engine"] != "ours":
        return f"{row['engine']} {row['engine_version']}"
    return f"**ours**, {row['mode']}" + (f", {row['tree_nodes']} nodes" if row["mode"] == "medusa" else "")


def drafts() -> str:
    """One table per dtype."""
    parts = []
    for row in rows("drafts"):
        count = row["num_prompts"]
        lines = [("none: plain decoding", "1", "1.00", f"{row['plain_tokens_per_second']:.0f}", "1.00×", "")]
        lines += [
            (
                s["draft"] if s["draft"] != "medusa" else f"medusa, {'chain' if _is_chain(s) else 'tree'}",
                str(s["tree_nodes"]),
                f"{s['tokens_per_step']:.2f}",
                f"{s['tokens_per_second']:.0f}",
                f"{s['speedup']:.2f}×",
                f"{s['equal_texts']} of {count}",
            )
            for s in row["sources"]
        ]
        head = ("draft", "nodes", "tokens/step", "tokens/s", "speedup", "equal texts")
        title = f"{row['dtype']}, {count} {row['prompts']} prompts:"
        parts.append(f"{title}\n\n{_markdown(head, lines)}\n\n{_made(row, where=True)}")
    return "\n\n".join(parts)


def sampling() -> str:
    """One table per dtype: tokens per step of each mode and temperature by tree."""
    parts = []
    for row in rows("sampling"):
        trees = list(dict.fromkeys(e["tree"] for e in row["entries"]))
        settings = list(dict.fromkeys((e["mode"], e["temperature"]) for e in row["entries"]))
        of = {(e["mode"], e["temperature"], e["tree"]): e for e in row["entries"]}
        lines = []
        for mode, temperature in settings:
            entries = [of[mode, temperature, tree] for tree in trees]
            cells = (
                f"{e['tokens_per_step']:.2f} ({e['of_greedy']:.0%}), {e['tokens_per_second']:.0f}" for e in entries
            )
            lines.append((mode, f"{temperature:.1f}", *cells))
        title = f"{row['dtype']}, {row['num_prompts']} {row['prompts']} prompts: tokens/step (of greedy's), tokens/s."
        parts.append(f"{title}\n\n{_markdown(('mode', 'T', *trees), lines)}\n\n{_made(row, where=True)}")
    return "\n\n".join(parts)


def losslessness() -> str:
    """One table per row: the proofs and their biased control."""
    parts = []
    for row in rows("losslessness"):
        lines = [("seeded texts that are plain sampling's", f"{row['equal_texts']} of {row['num_prompts']}", "")]
        both = (row, row["control"])
        for test, what in (("uniform", "places of {tokens} tokens"), ("outcomes", "{samples} short outputs")):
            form = "{chi_square:.0f} in {cells} cells, p = {p_value:.2g}"
            lines.append((f"{what}, chi-square".format(**row[test]), *(form.format(**tests[test]) for tests in both)))
        distances = [f"{tests['outcomes']['total_variation']:.3f}" for tests in both]
        lines.append((f"the same, total variation; by chance at most {row['outcomes']['bound']:.3f}", *distances))
        title = f"{row['dtype']}, tree {row['tree']}, temperature {row['temperature']}:"
        head = ("test", "lossless", f"{row['control']['mode']}, the biased control")
        parts.append(f"{title}\n\n{_markdown(head, lines)}\n\n{_made(row, where=True)}")
    return "\n\n".join(parts)


TABLES = {table.__name__: table for table in (decoding, peers, drafts, sampling, losslessness)}


def _is_chain(source: dict) -> bool:
    return source["tree_depth"] == source["tree_nodes"] - 1


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    body = [f"| {' | '.join(cells)} |" for cells in (head, *lines)]
    return "\n".join([body[0], "|---" * len(head) + "|", *body[1:]])


def _made(row: dict, *, where: bool = False) -> str:
    """Under a table; `where` if its title does not name the device."""
    return (f"{row['device']}; " if where else "") + f"torch {row['torch']}, commit {row['commit']}, {row['date']}."


def render(readme: str) -> str:
    """The README with its results blocks made anew. ValueError if one has no name of TABLES."""

    def fill(block: re.Match) -> str:
        begin, name, end = block.groups()
        if name not in TABLES:
            raise ValueError(f"results must be one of {', '.join(TABLES)}, not {name!r}")
        return f"{begin}{TABLES[name]()}\n{end}"

    return BLOCK.sub(fill, readme)


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
