"""The README's tables, made from bench/results: `python -m bench.readme` writes them, a test holds the two together."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: python -m bench.readme -->", "<!-- /results -->"
HEADER = (
    "| prompts | weights | tree | tokens/step | plain, tokens/s | Medusa, tokens/s | speedup | equal texts |\n"
    "|---|---|---|---|---|---|---|---|"
)


def rows() -> list[dict]:
    """The newest decoding row of each prompt set, device, backend, dtype and tree size, in the order of the files."""
    newest: dict[tuple, dict] = {}
    for path in sorted((ROOT / "bench" / "results").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["benchmark"] == "decoding":
                key = (row["device"], row["prompts"], row["backend"], row["dtype"], row["tree_nodes"])
                newest.pop(key, None)
                newest[key] = row
    return list(newest.values())


def table() -> str:
    """Markdown: one table per device, its versions and commit below it."""
    parts = []
    found = rows()
    for device in dict.fromkeys(row["device"] for row in found):
        mine = [row for row in found if row["device"] == device]
        lines = [
            f"On {device}, {mine[0]['backend']} backend, {mine[0]['max_new_tokens']} new tokens a prompt:",
            "",
            HEADER,
        ]
        lines += [_line(row) for row in mine]
        last = mine[-1]
        lines += ["", f"torch {last['torch']}, commit {last['commit']}, {last['date']}."]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(row: dict) -> str:
    cells = (
        f"{row['num_prompts']} {row['prompts']}",
        row["dtype"],
        f"{row['tree_nodes']} nodes",
        f"{row['tokens_per_step']:.2f}",
        f"{row['plain_tokens_per_second']:.0f}",
        f"{row['medusa_tokens_per_second']:.0f}",
        f"{row['speedup']:.2f}×",
        f"{row['equal_texts']} of {row['num_prompts']}",
    )
    return f"| {' | '.join(cells)} |"


def render(readme: str) -> str:
    """The README with its results block made anew."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
