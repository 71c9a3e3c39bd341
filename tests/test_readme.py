"""The README quotes only numbers that bench/results holds, and commands and names that exist."""

import re
import shlex
from pathlib import Path

import click
import pytest

import medusa_kernels
from bench.readme import KEYS, ROOT, TABLES, render, rows
from medusa_engine.cli import cli

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_results_are_those_of_bench_results():
    assert all(rows(benchmark) for benchmark in KEYS)
    assert render(README) == README
    for name in TABLES:
        assert f"<!-- results: {name} -->" in README


def test_a_block_of_no_known_name():
    with pytest.raises(
        ValueError, match="results must be one of decoding, peers, drafts, sampling, losslessness, not 'speed'"
    ):
        render("<!-- results: speed -->\n<!-- /results -->")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for line in "\n".join(blocks("bash")).splitlines() if line.startswith("medusa ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    _, *words = shlex.split(command, comments=True)
    found = cli
    while isinstance(found, click.Group):
        found = found.commands[words.pop(0)]
    found.make_context(found.name, words)


def test_python_is_understood():
    assert len(blocks("python")) >= 4
    for block in blocks("python"):
        compile(block, "README.md", "exec")


def test_ops_named_are_exported():
    named = re.findall(r"\bmk\.(\w+)", README)
    assert named
    for name in named:
        assert hasattr(medusa_kernels, name)


def test_files_named_exist():
    for name in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert Path(ROOT / name).exists(), name
