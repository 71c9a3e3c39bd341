"""`python -m bench.gpu`: where there is no GPU it says so; phases run in processes of their own."""

from __future__ import annotations

import os

import pytest
import torch
from click.testing import CliRunner

from bench.gpu import __main__, phases
from tests.bench_gpu.tiny import rows_of


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    result = CliRunner().invoke(__main__.main, ["--out", str(tmp_path)])
    assert result.exit_code == 0
    assert result.output == "no CUDA device here: the GPU's checks and benchmarks are skipped\n"
    assert not list(tmp_path.iterdir())


def test_phases_run_in_processes_of_their_own_and_their_rows_end_in_the_table(tmp_path, monkeypatch):
    """The parent believes in a GPU; the phase chosen needs none to skip itself."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU 1")
    monkeypatch.chdir(__main__.ROOT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((".", "python")))
    options = ["--only", "model,quick", "--out", str(tmp_path), "--commit", "abc", "--model", str(tmp_path / "none")]
    monkeypatch.setitem(phases.PHASES, "quick", phases.Phase(phases.PHASES["quick"].cases, -1))
    result = CliRunner().invoke(__main__.main, options)
    assert result.exit_code == 0, result.output
    first, second = rows_of(tmp_path / "some-gpu-1.jsonl")
    assert (first["phase"], first["reason"], first["commit"]) == ("model", f"no model at {tmp_path / 'none'}", "abc")
    assert (second["phase"], second["reason"]) == ("quick", "out of time before it began")
    assert {"device", "torch", "date"} <= first.keys()
    assert "skipped: 2" in result.output


def test_an_unknown_phase_is_a_usage_error():
    result = CliRunner().invoke(__main__.main, ["--only", "quick,nothing"])
    assert result.exit_code == 2
    assert "no phase 'nothing'; there are quick" in result.output


def test_a_device_names_its_file():
    assert __main__.slug("NVIDIA H200") == "nvidia-h200"
