"""The README quotes only numbers that bench/results holds, and commands and names that exist."""

import re
from pathlib import Path

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


def test_commands_exist():
    for verb in re.findall(r"\bmedusa (\w+)", "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))):
        assert verb in cli.commands


def test_ops_named_are_exported():
    for name in re.findall(r"medusa_kernels\.(\w+)", README):
        assert hasattr(medusa_kernels, name)


def test_files_named_exist():
    for name in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert Path(ROOT / name).exists(), name
