"""The checks: decoding by every way, what pytest and the sanitizers said, and what is missing here."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time

import pytest

from bench.gpu import __main__, checks


def test_decoding_is_the_same_by_every_way():
    assert checks.decoding_differs("cpu", steps=8) == ""
    assert checks.logits_differ("cpu", count=8) == ""


def test_what_pytest_said_is_counted():
    """Also up to where it was killed, and with xdist's workers."""
    output = (
        "tests/a.py::a[x y] PASSED [ 10%]\ntests/a.py::b FAILED [ 20%]\ntests/a.py::c SKIPPED (not here) [ 30%]\n"
        "[gw3] [ 40%] ERROR tests/a.py::d[1-2] \n[gw0] [ 50%] PASSED tests/a.py::e \ntests/a.py::e ERROR\n"
        "E   assert 1\nFAILED tests/a.py::b - assert 1\ntests/a.py::f "
    )
    assert checks.counted(output) == {
        "passed_tests": 1,
        "failed_tests": 3,
        "skipped_tests": 1,
        "failing": ["b", "d[1-2]", "e"],
    }


def test_a_row_for_each_file_of_tests(options, tmp_path, monkeypatch):
    """One passes, one has no test of the backend, one fails, one hangs: each costs only itself."""
    texts = {
        "test_good.py": "def test_cuda(): pass\ndef test_cpu(): assert False\n",
        "test_other.py": "def test_cpu(): assert False\n",
        "test_bad.py": "def test_cuda(): assert 1 == 2\n",
        "test_hangs.py": "import time\ndef test_cuda_first(): pass\ndef test_cuda(): time.sleep(600)\n",
    }
    for file, text in texts.items():
        (tmp_path / file).write_text(text)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    monkeypatch.setattr(checks, "files_of_tests", lambda: [*(str(tmp_path / f) for f in texts), "tests/engine"])
    monkeypatch.setattr(checks.os, "cpu_count", lambda: 16)
    tested = checks.tested
    monkeypatch.setattr(checks, "tested", lambda file, *a: tested(file, *a) if "/test_" in file else (None, ""))
    rows = list(checks.pytest("cuda", dataclasses.replace(options, deadline=time.time() + 15)))
    found = {row["case"].rsplit("/", 1)[1]: row for row in rows}
    assert found.keys() == {"test_good.py", "test_bad.py", "test_hangs.py"}
    assert (found["test_good.py"]["passed"], found["test_good.py"]["passed_tests"]) == (True, 1)
    assert (found["test_bad.py"]["passed"], found["test_bad.py"]["failing"]) == (False, ["test_cuda"])
    assert found["test_hangs.py"]["detail"] == "killed: out of time"
    assert found["test_hangs.py"]["passed_tests"] == 1
    assert rows[-1] is found["test_hangs.py"]
    assert "assert 1 == 2" in (options.logs / "tests-cuda.log").read_text()


def test_the_tests_begin_without_hypothesis():
    code = "import runpy, sys; sys.modules['hypothesis'] = None; runpy.run_path('tests/conftest.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=__main__.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_pytest_one_line_says_so(options, monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    (row,) = checks.pytest("cuda", options)
    assert row == {"benchmark": "skipped", "reason": "pytest is not installed"}


def test_sanitizers_give_a_row_each_whatever_becomes_of_the_others(options, tmp_path, monkeypatch):
    """The stand-in hangs for one tool, does not run for the second and is content with the third."""
    tool = tmp_path / "sanitizer"
    tool.write_text(
        "#!/bin/sh\ncase $2 in\n"
        "memcheck) echo '========= COMPUTE-SANITIZER'; echo '3 of 24: linear: right'; exec sleep 60;;\n"
        "racecheck) echo 'Device not supported';;\n"
        "*) echo '========= ERROR SUMMARY: 0 errors';;\nesac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(checks, "_sanitizer", lambda: str(tool))
    rows = {r["case"]: r for r in checks.sanitize(dataclasses.replace(options, deadline=time.time() + 3))}
    assert rows["memcheck"]["detail"] == "killed: out of time / 3 of 24: linear: right"
    assert not rows["memcheck"]["passed"]
    assert "racecheck did not run" in rows["racecheck"]["error"]
    assert rows["synccheck"]["passed"]


@pytest.mark.parametrize(
    ("code", "output", "passed"),
    [
        (0, "24 of 24 cases are right\n========= ERROR SUMMARY: 0 errors\n", True),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", True),
        (0, "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n", False),
        (9, "========= Invalid __global__ write\n========= ERROR SUMMARY: 10 errors\n", False),
        (1, "rms_norm: output 0 is off by 1\n========= ERROR SUMMARY: 0 errors\n", False),
        (None, "========= Invalid __global__ write\n", False),
    ],
)
def test_a_sanitizers_verdict(code, output, passed):
    assert checks.verdict("memcheck", code, output)["passed"] is passed


def test_a_sanitizer_that_did_not_run_is_no_pass():
    with pytest.raises(RuntimeError, match=r"memcheck did not run.*Device not supported"):
        checks.verdict("memcheck", 0, "========= Error: Device not supported\n========= ERROR SUMMARY: 0 errors\n")


def test_without_the_sanitizer_its_case_is_skipped(options, monkeypatch):
    monkeypatch.setattr(checks, "_sanitizer", lambda: None)
    (row,) = checks.sanitize(options)
    assert row["benchmark"] == "skipped"
