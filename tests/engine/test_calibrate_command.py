"""`medusa calibrate`: the curve and the choice as a table and as JSON, what it stores, and one line a mistake."""

import importlib.util
import json
import re
import shutil
from functools import partial

import pytest

from medusa_engine import Medusa, calibrate, calibration
from medusa_engine.heads_files import load_heads
from tests.engine.calibrating import PROMPTS, costs
from tests.engine.models import counting_folder, counting_heads_folder, shown

pytestmark = pytest.mark.usefixtures("cache")

HEADS = ["--heads", counting_heads_folder(4, patchy=True)]


@pytest.fixture
def command(medusa, tmp_path):
    """command(*arguments) -> what `medusa calibrate` over PROMPTS ends with and says."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    common = ["--prompts", tmp_path / "prompts.txt", "-n", 20, "--rounds", 2, "--context", 16, "--dtype", "float32"]
    return partial(medusa, "calibrate", *common, "--model", counting_folder())


def test_the_command_prints_the_curve_and_the_choice(command, monkeypatch, cache):
    monkeypatch.setattr(calibrate, "step_samples", costs(lambda n: 0.01 * (1 + n / 20)))
    code, out, _ = command(*HEADS, "--batch", 1, "--batch", 2)
    (path,) = cache.glob("*.json")
    found = calibration.read(path)
    assert code == 0
    assert f"heads judged on 40 answers, {found.about['positions']} tokens" in out
    assert [line.split()[0] for line in out.splitlines() if re.match(r" +[1-4] +0\.\d{3} +1\.000 ", line)] == [*"1234"]
    for batch in (1, 2):
        chosen = found.nodes(batch)
        speedup = found.tokens_per_step[chosen - 1] * 1.05 / (1 + chosen / 20)
        assert chosen > 1
        assert found.speedup(batch, chosen) == pytest.approx(speedup)
        assert f"\nbatch {batch}, context 16, medians of 2\n" in out
        row = rf" +{chosen} +{10 + chosen / 2:.2f} +\d\.\d\d +{found.tokens_per_step[chosen - 1]:.3f} +"
        rate = batch * found.tokens_per_step[chosen - 1] / (0.01 * (1 + chosen / 20))
        assert re.search(rf"\n{row}{rate:.1f} +{speedup:.2f}x  <- chosen\n", out)
        assert f"tree: {chosen} nodes {found.tree(batch).choices}; expected speedup {speedup:.2f}x" in out
    assert out.count("<- chosen") == 2
    assert out.endswith(f"written to {path} and {path.with_suffix('.png')}\n")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "machine was busy" not in out


def test_a_busy_machine_is_said(command, monkeypatch):
    monkeypatch.setattr(
        calibrate, "step_samples", lambda m, d, trees, p, r: {tree.num_nodes: [1.0, 2.0, 3.0] for tree in trees}
    )
    assert "the times vary by 100%: the machine was busy" in command(*HEADS)[1]


def test_the_command_as_json(command, cache, tmp_path):
    code, out, _ = command(*HEADS, "--json", "--plot", tmp_path / "curves.png", "--limit", 12)
    (path,) = cache.glob("*")
    found = calibration.read(path)
    result = json.loads(out)
    assert code == 0
    assert (result["calibration"], result["plot"]) == (str(path), str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (result["conversations"], result["temperatures"]) == (12, found.temperatures)
    one = result["batches"]["1"]
    assert one["tree"] == found.tree(1).choices
    assert [p["nodes"] for p in one["points"] if p["chosen"]] == [one["tree_nodes"]]
    assert {p["nodes"]: p["step_seconds"] for p in one["points"]} == found.curves[1].step_seconds
    assert one["points"][0]["cost"] == one["points"][0]["speedup"] == 1.0


def test_store_writes_the_temperatures(command, tmp_path):
    shutil.copytree(counting_heads_folder(4, patchy=True), tmp_path / "mine")
    code, out, _ = command("--heads", tmp_path / "mine", "--store", "--json")
    assert code == 0
    assert load_heads(tmp_path / "mine").metadata["temperatures"] == json.loads(out)["temperatures"]


def test_without_matplotlib(command, monkeypatch, cache, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, _ = command(*HEADS, "--json")
    assert (code, json.loads(out)["plot"]) == (0, None)
    assert not list(cache.glob("*.png"))
    monkeypatch.setattr(Medusa, "from_pretrained", None)  # said before any work
    code, _, err = command(*HEADS, "--plot", tmp_path / "x.png")
    assert (code, err) == (2, "medusa: the curves as PNG need `pip install 'medusa-kernels[bench]'`\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no Medusa heads to calibrate"),
        ([*HEADS, "--limit", 1], "at least 2 prompts"),
        ([*HEADS, "--context", 4096], "context must be between 1 and 127, not 4096"),
        (["--store"], "holds a whole model, not heads alone"),
        ([*HEADS, "--batch", 0], "0 is not in the range"),
    ],
    ids=lambda case: " ".join(map(shown, case)) if isinstance(case, list) else None,
)
def test_a_mistake_is_one_line(arguments, message, command):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
