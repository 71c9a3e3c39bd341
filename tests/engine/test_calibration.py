"""The calibration file: the best tree by what it holds, where it lies, what damage is said to be, and who reads it."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_engine import Medusa, calibrate, calibration
from medusa_engine.calibration import Calibration, Curve, best_nodes
from medusa_engine.draft import MedusaDrafter
from medusa_engine.heads_files import load_heads, save_heads
from medusa_kernels import Tree
from tests.engine.calibrating import costs, patchy, quick
from tests.engine.models import counting_folder, counting_heads_folder, write_counting

pytestmark = pytest.mark.usefixtures("cache")


# The choice


@pytest.mark.parametrize(
    ("step_seconds", "best"),
    [
        (lambda n: 1.0, 64),  # nodes are free
        (lambda n: float(n), 1),  # a node costs a whole step: plain decoding
        (lambda n: 1.0 if n <= 8 else 0.9 * n, 8),  # free up to 8
        (lambda n: 10 + 0.1 * n, max(range(1, 65), key=lambda n: (1 + math.log(n)) / (10 + 0.1 * n))),
    ],
)
def test_the_best_tree_has_the_most_tokens_per_second(step_seconds, best):
    brings = [1 + math.log(n) for n in range(1, 65)]
    curve = Curve(256, 1, 0.0, {n: step_seconds(n) for n in range(1, 65)})
    assert best_nodes(brings, curve) == best


def test_of_equals_the_smallest_and_never_more_than_was_measured():
    assert best_nodes([1.0, 2.0, 3.0, 4.0], Curve(8, 1, 0.0, {1: 1.0, 2: 2.0, 4: 4.0})) == 1
    assert best_nodes([1.0, 2.0, 3.0], Curve(8, 1, 0.0, {1: 1.0, 2: 1.0})) == 2
    assert best_nodes([1.0, 2.0], Curve(8, 1, 0.0, {1: 1.0, 8: 1.0})) == 2


def test_a_curve_needs_the_root_alone():
    for wrong in ({}, {2: 1.0}, {1: 0.0}, {1: 1.0, 2: -1.0}):
        with pytest.raises(ValueError, match="hold node count 1"):
            Curve(8, 1, 0.0, wrong)


# The file


def test_the_file_holds_what_was_returned(cache):
    path, found = quick(patchy(), batches=(1, 3))
    assert path.parent == cache
    assert sorted(cache.iterdir()) == [path]  # no partial answers are left
    assert calibration.read(path) == found
    assert set(found.curves) == {1, 3}
    assert found.curves[1].context == 20
    sizes = [n for n in calibrate.NODES if n <= len(found.tokens_per_step)]
    assert set(sizes) <= set(found.curves[1].step_seconds)
    assert all(seconds > 0 for seconds in found.curves[1].step_seconds.values())
    assert found.tree(2) is None


def test_the_dataclass_reads_its_own_json(tmp_path):
    made = Calibration(
        about={"text": "x"},
        accuracy=[[0.5, 0.25]],
        temperatures=[1.5],
        log_loss=[[2.0, 1.5]],
        paths=[[0], [1], [0, 0]],
        tokens_per_step=[1.0, 1.5, 1.75, 1.8],
        curves={4: Curve(64, 3, 0.1, {1: 0.1, 3: 0.11, 4: 0.5})},
    )
    calibration.write(tmp_path / "a" / "b.json", made)
    assert calibration.read(tmp_path / "a" / "b.json") == made
    assert made.tree(4) == Tree.from_choices([[0], [1]])
    assert made.speedup(4, 3) == pytest.approx(1.75 / 1.1)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.json"]


def test_every_machine_model_heads_and_dtype_has_its_own(monkeypatch, tmp_path):
    def path(model, heads, dtype="float32", backend="cpu"):
        engine = Medusa.from_pretrained(model, heads, dtype=dtype, backend=backend)
        return calibration.locate(engine.model, MedusaDrafter(engine.model, engine.heads))

    other_model = write_counting(tmp_path / "other", max_position_embeddings=64)
    tuned = write_counting(tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"] *= 1.01
    save_file(tensors, tuned / "model.safetensors")
    sharper = load_heads(counting_heads_folder(4))
    save_heads(tmp_path / "sharper", replace(sharper, lm_head_weight=2 * sharper.lm_head_weight), dtype=torch.float32)
    paths = [
        path(counting_folder(), counting_heads_folder(4)),
        path(counting_folder(), counting_heads_folder(4, patchy=True)),
        path(counting_folder(), counting_heads_folder(2)),
        path(counting_folder(), counting_heads_folder(4), "bfloat16"),
        path(counting_folder(), counting_heads_folder(4), backend="reference"),
        path(other_model, counting_heads_folder(4)),
        path(tuned, counting_heads_folder(4)),
        path(counting_folder(), tmp_path / "sharper"),
    ]
    monkeypatch.setattr(calibration.machine, "describe", lambda device: "Other CPU @ 3 GHz, 7 threads")
    paths.append(path(counting_folder(), counting_heads_folder(4)))
    assert len(set(paths)) == len(paths)
    assert paths[-1].name.startswith("other-cpu-3-ghz-7-threads-float32-")
    monkeypatch.undo()
    assert path(counting_folder(), counting_heads_folder(4)).name == paths[0].name


DAMAGE = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "another thing": lambda text: "[]",
    "another version": lambda text: text.replace('"version": 1', '"version": 2'),
    "a field less": lambda text: text.replace('"paths"', '"path"'),
    "no tree": lambda text: json.dumps({**json.loads(text), "paths": [[0, 0]] * 20}),
    "no root": lambda text: text.replace('"step_seconds": {"1": ', '"step_seconds": {"0": '),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_said_passed_over_and_replaced(damage, monkeypatch, cache):
    monkeypatch.setattr(calibrate, "step_samples", costs(lambda n: 1.0))
    engine = patchy()
    default = engine.tree(1)
    path, found = quick(engine)
    assert engine.tree(1) == found.tree(1) != default
    damaged = damage(path.read_text(encoding="utf-8"))
    assert damaged != path.read_text(encoding="utf-8")
    path.write_text(damaged, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{path.name} is no calibration") as caught:
        calibration.read(path)
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match="is no calibration.*`medusa calibrate` writes it anew"):
        assert engine.tree(1) == default
    with pytest.warns(UserWarning, match="is no calibration"):
        assert patchy().generate("a", 20).token_ids == list(range(2, 22))
    assert quick(engine)[1] == found == calibration.read(path)


# Who reads it


@pytest.mark.parametrize(("step_seconds", "wanted"), [(lambda n: 1.0, None), (lambda n: float(n), 1)])
def test_auto_is_the_calibrated_tree(step_seconds, wanted, monkeypatch):
    monkeypatch.setattr(calibrate, "step_samples", costs(step_seconds))
    engine, default = patchy(), patchy().tree(2)
    other = Medusa.from_pretrained(counting_folder(), counting_heads_folder(4), dtype="float32")
    untouched = other.tree(1)
    _, found = quick(engine, batches=(1, 3))
    for e in (engine, patchy()):
        assert e.tree(1) == e.tree(3) == found.tree(1)
        assert e.tree(1).num_nodes == (wanted or best_nodes(found.tokens_per_step, found.curves[1]))
        assert e.tree(2) == default  # not measured
        assert e.tree(1, medusa=False).num_nodes == 1
        out = e.generate("a", 40)
        assert out.token_ids == list(range(2, 42))
        assert out.stats.tokens_per_step == 1.0 if wanted == 1 else out.stats.tokens_per_step > 2
    assert patchy(tree="chain-2").tree(1) == Tree.named("chain-2")
    assert other.tree(1) == untouched  # other heads
