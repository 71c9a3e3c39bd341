"""Building for the GPU at hand: one way after the other, and nothing where there is none."""

from __future__ import annotations

import os
import sys

import torch

from bench.gpu import __main__, build


def way(name, code):
    return build.Way(name, [sys.executable, "-c", code], __main__.ROOT)


def test_the_first_way_that_works_is_taken_and_the_others_say_why_they_did_not(capsys):
    ways = [way("a", "import sys; sys.exit('externally managed')"), way("b", ""), way("c", "1/0")]
    assert build.built(ways, os.environ) == "b"
    assert capsys.readouterr().out == "the build by a failed:\nexternally managed\n"


def test_a_way_that_hangs_is_ended(capsys):
    assert build.built([way("a", "import time; time.sleep(60)")], os.environ, seconds=0.5) == ""
    assert "killed after 0 s" in capsys.readouterr().out


def test_the_second_way_reads_no_pyproject_and_puts_the_module_where_the_first_does(tmp_path):
    _, (_, command, folder) = build.ways(tmp_path)
    assert folder == tmp_path
    assert command[1] == str(__main__.ROOT / "setup.py")
    assert command[-1] == str(__main__.ROOT)


def test_a_failed_build_is_said(monkeypatch, capsys):
    monkeypatch.setattr(build, "architectures", lambda: ["90"])
    monkeypatch.setattr(build, "built", lambda ways, env: "")
    assert build.main() == 1
    assert "the CUDA kernels could not be built" in capsys.readouterr().out


def test_without_nvidia_smi_torch_is_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (8, 6), (9, 0))[i])
    assert build.architectures() == ["86", "90"]


def test_without_a_gpu_nothing_is_built(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert build.main() == 0
    assert capsys.readouterr().out == "no NVIDIA GPU here: nothing is built\n"
