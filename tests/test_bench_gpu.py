"""bench.gpu where there is no GPU: it says so, and all of it that needs none is right."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner

from bench import _timing, ops
from bench.gpu import (
    __main__,
    attention_rivals,
    build,
    checks,
    compiled,
    decoding,
    decoding_rivals,
    generating,
    geometry,
    harness,
    kernels,
    phases,
    replay,
    small,
    worker,
)
from bench.gpu.report import report
from medusa_engine import Medusa
from medusa_engine.draft import MedusaDrafter
from medusa_engine.model import Model
from medusa_kernels import Tree
from tests.engine.stand_in_gpu import StandIn, native_launches_on_tape

ATTENTION = {"n": 16, "heads": 8, "kv_heads": 2, "head_dim": 32, "prefix": 40, "batch": 2}


@pytest.fixture
def options(tmp_path):
    return harness.Options(tmp_path / "rows.jsonl", tmp_path, time.time() + 60)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(_timing, "bandwidth", lambda device: 1e10)
    monkeypatch.setattr(_timing, "flops", lambda device: 1e11)
    monkeypatch.setattr(_timing, "medians", lambda calls, device, seconds: dict.fromkeys(calls, 1e-4))


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tiny_model(dtype: str = "float32") -> tuple[geometry.RandomCheckpoint, Model]:
    checkpoint = geometry.RandomCheckpoint(checks.TINY, "cpu")
    device = torch.device("cpu")
    return checkpoint, Model(checkpoint, backend="reference", device=device, dtype=dtype, max_positions=128)


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


def test_groups_are_calls_in_which_every_phase_gets_its_time():
    assert sorted(name for group in phases.GROUPS.values() for name in group) == sorted(phases.PHASES)
    for group in phases.GROUPS.values():
        assert sum(phases.PHASES[name].seconds for name in group) <= phases.BUDGET - phases.BUILD
    assert phases.BUDGET + harness.GRACE < 600
    assert phases.named("proof,quick,tests") == ["tests", "sanitizers", "quick"]


def test_what_the_aims_are_stated_in_comes_first(options):
    names = [case.name for case in kernels.cases(options)]
    assert names[:3] == ["ceilings", "attention h32x32 n64 b1 prefix8192", "attention h32x8 n64 b1 prefix8192"]
    for start in ("attention h32x8 n16 b8 prefix32768", "draft_heads", "verify_tree lossless n64 v128256", "compact_kv",
                  "linear vicuna-7b qkv r16"):  # fmt: skip
        assert any(name.startswith(start) for name in names), start
    every = names[1:] + [case.name for case in kernels.more_cases(options)]
    assert sorted(every) == sorted(name for _, name, *_ in kernels.SHAPES)


@pytest.mark.parametrize("phase", phases.PHASES)
def test_cases_have_names_of_their_own(phase, options):
    names = [case.name for case in phases.PHASES[phase].cases(options)]
    assert names
    assert len(set(names)) == len(names)


def test_compiled_rivals_cover_the_grid_the_widest_first(options):
    names = [name for _, name, *_ in kernels.SHAPES]
    listed = [case.name for case in kernels.rival_cases(options)]
    assert set(listed) == {name for name in names if "attention" in name and " n1 " not in name}
    assert listed[:2] == ["attention h32x32 n64 b1 prefix2048", "attention h32x8 n64 b1 prefix2048"]


class TestHarness:
    def test_a_failing_case_costs_only_itself(self, options, tmp_path, capsys):
        def fails():
            yield {"benchmark": "kernel", "us": 1.0}
            raise ValueError("no such thing")

        listed = [harness.Case("bad", fails), harness.Case("good", lambda: [{"benchmark": "kernel", "us": 2.0}])]
        record = harness.Recorder(options.rows, "kernels", {"device": "none"})
        assert harness.work(listed, record, tmp_path / "progress", skip=0, deadline=options.deadline) == 0
        rows = rows_of(options.rows)
        assert [row["case"] for row in rows] == ["bad", "bad", "good"]
        assert rows[1]["error"] == "ValueError: no such thing"
        assert all(row["phase"] == "kernels" and row["device"] == "none" for row in rows)
        assert "good: us=2" in capsys.readouterr().out

    def test_no_case_begins_after_the_deadline(self, options, tmp_path):
        listed = [harness.Case(name, lambda: [{"benchmark": "check"}]) for name in "ab"]
        record = harness.Recorder(options.rows, "quick", {})
        harness.work(listed, record, tmp_path / "progress", skip=0, deadline=time.time() - 1)
        (row,) = rows_of(options.rows)
        assert (row["benchmark"], row["reason"]) == ("skipped", "out of time, with 2 cases left")

    def test_another_worker_goes_on_behind_the_case_that_killed_the_last(self, options, tmp_path):
        """The stand-in worker dies in case 1 of 3 and notes which cases it ran."""
        progress, ran = tmp_path / "progress", tmp_path / "ran"
        script = (
            "import os, pathlib, sys\n"
            f"progress, ran = pathlib.Path({str(progress)!r}), open({str(ran)!r}, 'a')\n"
            "for i in range(int(sys.argv[1]), 3):\n"
            "    progress.write_text(f'{i} case {i}'); ran.write(str(i)); ran.flush()\n"
            "    if i == 1: os.abort()\n"
        )
        record = harness.Recorder(options.rows, "kernels", {})
        harness.run_phase(
            lambda skip: [sys.executable, "-c", script, str(skip)], record, progress,
            deadline=options.deadline, case_seconds=60,
        )  # fmt: skip
        assert ran.read_text() == "012"
        (row,) = rows_of(options.rows)
        assert (row["case"], row["error"]) == ("case 1", "the process died with -6")

    def test_a_case_that_hangs_costs_only_itself(self, options, tmp_path):
        progress, ran = tmp_path / "progress", tmp_path / "ran"
        script = (
            "import pathlib, sys, time\n"
            f"progress, ran = pathlib.Path({str(progress)!r}), open({str(ran)!r}, 'a')\n"
            "for i in range(int(sys.argv[1]), 3):\n"
            "    progress.write_text(f'{i} case {i}'); ran.write(str(i)); ran.flush()\n"
            "    if i == 1: time.sleep(60)\n"
        )
        harness.run_phase(
            lambda skip: [sys.executable, "-c", script, str(skip)], harness.Recorder(options.rows, "kernels", {}),
            progress, deadline=options.deadline, case_seconds=1,
        )  # fmt: skip
        assert ran.read_text() == "012"
        (row,) = rows_of(options.rows)
        assert (row["case"], row["error"]) == ("case 1", "did not end within 1 s; the process was killed")

    def test_a_worker_that_never_begins_is_not_tried_again(self, options, tmp_path):
        record = harness.Recorder(options.rows, "kernels", {})
        harness.run_phase(
            lambda skip: [sys.executable, "-c", "raise SystemExit(3)"], record, tmp_path / "p",
            deadline=time.time() + 9, case_seconds=60,
        )  # fmt: skip
        (row,) = rows_of(options.rows)
        assert row["error"] == "the worker ended with 3 before its first case"

    def test_a_command_and_its_children_end_at_the_deadline(self, tmp_path):
        alive = tmp_path / "alive"
        child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(alive)!r}).touch()"
        parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
        assert harness.run_until([sys.executable, "-c", parent], time.time() + 1) is None
        time.sleep(2.2)
        assert not alive.exists()

    def test_a_worker_reads_what_its_parent_wrote(self, options, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setitem(phases.PHASES, "quick", phases.Phase(lambda o: seen.append(o) or [], 1))
        options = dataclasses.replace(options, commit="abc")
        given = worker.arguments(options, "quick", tmp_path / "progress", 3)
        assert worker.main(given) == 0
        assert seen == [harness.Options(options.rows, tmp_path, options.deadline, commit="abc")]


class TestBuild:
    @staticmethod
    def way(name, code):
        return build.Way(name, [sys.executable, "-c", code], __main__.ROOT)

    def test_the_first_way_that_works_is_taken_and_the_others_say_why_they_did_not(self, capsys):
        ways = [self.way("a", "import sys; sys.exit('externally managed')"), self.way("b", ""), self.way("c", "1/0")]
        assert build.built(ways, os.environ) == "b"
        assert capsys.readouterr().out == "the build by a failed:\nexternally managed\n"

    def test_a_way_that_hangs_is_ended(self, capsys):
        assert build.built([self.way("a", "import time; time.sleep(60)")], os.environ, seconds=0.5) == ""
        assert "killed after 0 s" in capsys.readouterr().out

    def test_the_second_way_reads_no_pyproject_and_puts_the_module_where_the_first_does(self, tmp_path):
        _, (_, command, folder) = build.ways(tmp_path)
        assert folder == tmp_path
        assert command[1] == str(__main__.ROOT / "setup.py")
        assert command[-1] == str(__main__.ROOT)

    def test_a_failed_build_is_said(self, monkeypatch, capsys):
        monkeypatch.setattr(build, "architectures", lambda: ["90"])
        monkeypatch.setattr(build, "built", lambda ways, env: "")
        assert build.main() == 1
        assert "the CUDA kernels could not be built" in capsys.readouterr().out

    def test_without_nvidia_smi_torch_is_asked(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (8, 6), (9, 0))[i])
        assert build.architectures() == ["86", "90"]

    def test_without_a_gpu_nothing_is_built(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert build.main() == 0
        assert capsys.readouterr().out == "no NVIDIA GPU here: nothing is built\n"


class TestReplay:
    @pytest.mark.parametrize("tokens_per_step", replay.TOKENS_PER_STEP.values())
    def test_the_mean_is_the_published_one(self, tokens_per_step):
        tree = replay.tree_of(64)
        nodes = replay.draw(tree, tokens_per_step, (50, 2))
        assert nodes.shape == (50, 2)
        assert 1 + tree.depths[nodes].double().mean().item() == pytest.approx(tokens_per_step, abs=0.05)

    def test_nodes_come_as_often_as_the_product_rule_says(self):
        """Two guesses deep: the share of steps that stop at a node is its product less its children's."""
        tree = Tree.named("2x1")
        first, second, *_ = replay.rescaled(tree, 2.0)
        shares = torch.bincount(replay.draw(tree, 2.0, (10000,)), minlength=tree.num_nodes) / 10000
        expected = [
            1 - first[0] - first[1],
            *(p * (1 - second[0]) for p in first[:2]),
            *(p * second[0] for p in first[:2]),
        ]
        assert shares.tolist() == pytest.approx(expected, abs=1e-3)

    def test_accuracies_stay_probabilities_and_keep_their_order(self):
        for row in replay.rescaled(replay.tree_of(64), 3.47):
            assert all(p > 0 for p in row)
            assert sum(row) < 1

    def test_a_mean_beyond_the_tree_is_refused(self):
        with pytest.raises(ValueError, match=r"between 1 and 3, not 3\.2"):
            replay.rescaled(Tree.named("4x2"), 3.2)

    def test_a_step_accepts_what_was_drawn(self):
        checkpoint, model = tiny_model()
        tree = Tree.named("3x2")
        drafter = MedusaDrafter(model, geometry.random_heads(checkpoint, own_lm_heads=True))
        decoder = replay.ReplayedDecoder(model, drafter, tree, batch=2, max_seqlen=64)
        leaf = tree.num_nodes - 1
        decoder.replay(torch.tensor([[0, leaf], [1, 0]]))
        decoder.start([[1, 2], [3, 4, 5]], None)
        lengths = []
        for _ in range(3):
            decoder.step()
            lengths.append(decoder.accept_length.tolist())
        assert lengths == [[0, 2], [1, 0], [0, 2]]
        assert decoder.accepted_nodes.tolist() == [[0, -1, -1], [0, int(tree.parents[leaf]), leaf]]
        assert decoder.cache.seqlens.tolist() == [2 + 1 + 2 + 1, 3 + 3 + 1 + 3]


class TestGeometry:
    def test_bytes_are_those_of_the_published_models(self):
        assert geometry.weight_bytes(geometry.VICUNA_7B) == pytest.approx(13.2e9, rel=0.01)
        assert geometry.weight_bytes(geometry.LLAMA3_8B) == pytest.approx(15.0e9, rel=0.01)
        assert geometry.kv_bytes(geometry.VICUNA_7B, 1) == 2**19
        assert geometry.heads_bytes(geometry.VICUNA_7B, own_lm_heads=True) == pytest.approx(1.48e9, rel=0.01)

    def test_weight_bytes_are_those_the_model_holds(self):
        _, model = tiny_model("bfloat16")
        matrices = [m for layer in model.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        assert geometry.weight_bytes(checks.TINY) == sum(map(ops.storage, [*matrices, model.lm_head]))


class TestKernels:
    def test_small_cases_agree_with_the_reference(self):
        assert not [case for case in small.CASES[5:] if small.failure(*case, device="cpu", backend="reference")]

    def test_a_kernel_that_is_wrong_or_changes_is_found(self, monkeypatch):
        case = ("silu_mul", "fp32", {"rows": 2, "ffn": 8})
        right, noise = ops.call, iter(range(1, 100))

        def call(op, variant, device, work):
            run = right(op, "reference", device, work)
            return run if variant == "reference" else lambda: (run(), work.outputs[0].mul_(factor()))

        monkeypatch.setattr(ops, "call", call)
        factor = lambda: 2.0  # noqa: E731
        assert "output 0 is off by" in small.failure(*case, device="cpu", backend="cpu")
        factor = lambda: 1 + 1e-6 * next(noise)  # noqa: E731
        assert small.failure(*case, device="cpu", backend="cpu") == "two launches differ"
        assert "5 of 5 launches" in small.unstable(*case, device="cpu", backend="cpu", repeats=5)

    def test_rows_of_a_case(self, fast):
        rows = list(kernels.measure("tree_attention", "fp32", ATTENTION, kernels.attention_baseline, "cpu"))
        assert {row["implementation"] for row in rows} >= {"reference", "sdpa"}
        assert all(row["us"] == pytest.approx(100) for row in rows)
        assert all(row["percent_of_floor"] == pytest.approx(row["floor_us"]) for row in rows)

    def test_a_rival_that_is_wrong_or_fails_gets_no_time(self, fast):
        def rivals(work):
            def fails():
                raise RuntimeError("not this shape")

            def unprepared():
                raise RuntimeError("no compiler")

            return {
                "wrong": lambda: lambda: torch.zeros_like(work.outputs[0]),
                "fails": lambda: fails,
                "unprepared": unprepared,
                "idle": lambda: lambda: None,
            }

        rows = {r["implementation"]: r for r in kernels.measure("tree_attention", "fp32", ATTENTION, rivals, "cpu")}
        assert "output 0 is off by" in rows["wrong"]["failed"]
        assert rows["fails"]["failed"] == "RuntimeError: not this shape"
        assert rows["unprepared"]["failed"] == "RuntimeError: no compiler"
        assert "off by nan" in rows["idle"]["failed"]
        assert "us" in rows["reference"]

    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    def test_rivals_compute_tree_attention(self):
        work = kernels.made("tree_attention", "fp32", ATTENTION, "cpu")
        reference = ops.call("tree_attention", "reference", "cpu", work)
        arguments = work.arguments[:6]
        for rival in (attention_rivals.sdpa(*arguments), attention_rivals.flex(*arguments, compiled=False)):
            assert kernels.difference("tree_attention", work, rival, reference) == ""

    @pytest.mark.parametrize("own", [False, True])
    def test_torch_draft_heads_compute_draft_heads(self, own):
        work = kernels.made(
            "draft_heads", "fp32", {"heads": 3, "hidden": 64, "vocab": 99, "top_k": 5, "own": own}, "cpu"
        )
        reference = ops.call("draft_heads", "reference", "cpu", work)
        (prepare,) = kernels.baseline("draft_heads")(work).values()
        assert kernels.difference("draft_heads", work, prepare(), reference) == ""

    @pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
    def test_a_backend_that_cannot_run_is_a_row_that_says_why(self, fast, monkeypatch):
        ours = kernels.ours
        monkeypatch.setattr(kernels, "ours", lambda op, work, device: ours(op, work, "cuda") | ours(op, work, "cpu"))
        rows = {r["implementation"]: r for r in kernels.measure("silu_mul", "fp32", {"rows": 2, "ffn": 8},
                                                                kernels.baseline("silu_mul"), "cpu")}  # fmt: skip
        assert rows.keys() == {"cuda", "cpu", "reference"}
        assert rows["cuda"]["failed"].startswith("ValueError: backend 'cuda'")

    def test_a_slow_reference_is_timed_once(self, fast, monkeypatch):
        monkeypatch.setattr(kernels, "SLOW", 0.0)
        rows = {r["implementation"]: r for r in kernels.measure("silu_mul", "fp32", {"rows": 2, "ffn": 8},
                                                                kernels.baseline("silu_mul"), "cpu")}  # fmt: skip
        assert rows["cpu"]["us"] == pytest.approx(100)
        assert rows["cpu"]["times_reference"] == pytest.approx(rows["reference"]["us"] / 100)

    @pytest.mark.parametrize("rows", [1, 3])
    def test_torch_linear_computes_linear(self, rows):
        work = kernels.made("linear", "fp32", {"rows": rows, "inputs": 16, "outputs": 9}, "cpu")
        reference = ops.call("linear", "reference", "cpu", work)
        (prepare,) = kernels.baseline("linear")(work).values()
        assert kernels.difference("linear", work, prepare(), reference) == ""

    @pytest.mark.parametrize("mode", ["greedy", "typical", "lossless"])
    def test_the_logits_first_rival_is_right(self, mode):
        dims = {"n": 7, "hidden": 16, "vocab": 60, "mode": mode}
        rows = {
            r["implementation"]: r
            for r in kernels.measure("verify_lm_head", "fp32", dims, kernels.baseline("verify_lm_head"), "cpu")
        }
        assert {"reference", "cpu", "torch, verify_tree"} == set(rows)
        assert not any("failed" in row for row in rows.values())

    def test_verify_tree_takes_half_the_bytes_in_bf16(self):
        dims = {"n": 4, "vocab": 100, "mode": "greedy"}
        work = kernels.made("verify_tree", "bf16", dims, "cpu")
        assert work.bytes == 4 * 100 * 2
        assert work.arguments[0].dtype == torch.bfloat16


class TestChecks:
    def test_decoding_is_the_same_by_every_way(self):
        assert checks.decoding_differs("cpu", steps=8) == ""
        assert checks.logits_differ("cpu", count=8) == ""

    @pytest.mark.parametrize(("draft", "tree"), generating.SOURCES)
    def test_generating_is_the_same_ahead_of_the_host(self, draft, tree, monkeypatch):
        """With the CPU's kernels on a tape for a graph."""
        monkeypatch.setattr(generating, "NEW_TOKENS", 15)
        engines = []

        def engine_of(*source, **options):
            engines.append(generating.engine(*source, device="cpu", backend="cpu", **options))
            engines[-1]._gpu = StandIn()
            return engines[-1]

        with native_launches_on_tape():
            assert generating.differs(engine_of, draft, tree) == ""
        assert [engine._gpu.captured for engine in engines] == [1, 2]

    @pytest.mark.parametrize(("draft", "tree"), generating.SOURCES)
    def test_a_wait_for_the_host_is_found(self, draft, tree, monkeypatch):
        modes = []
        monkeypatch.setattr(generating, "Cuda", lambda device: StandIn())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
        with native_launches_on_tape():
            assert generating.waits_for_the_host(draft, tree, device="cpu") == ""
            assert modes == ["error", "default"] * 2

            def refused(self, b):
                raise RuntimeError("called a synchronizing CUDA operation")

            monkeypatch.setattr(decoding.Decoder, "retire", refused)
            assert "synchronizing" in generating.waits_for_the_host(draft, tree, device="cpu")
        assert modes[-1] == "default"

    def test_a_generation_that_differs_is_found(self, monkeypatch):
        monkeypatch.setattr(generating, "NEW_TOKENS", 6)
        engine_of = functools.partial(generating.engine, device="cpu", backend="cpu")
        generate = Medusa.generate
        for field, wrong in (("token_ids", [[1]] * 3), ("text", [""] * 3), ("finish_reason", ["eos"] * 3)):
            monkeypatch.setattr(
                Medusa, "generate", lambda *a, f=field, w=wrong, **k: dataclasses.replace(generate(*a, **k), **{f: w})
                if k else generate(*a)
            )  # fmt: skip
            assert "than steps in turn" in generating.differs(engine_of, "medusa", "4x2x2")

    def test_what_pytest_said_is_counted(self):
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

    def test_a_row_for_each_file_of_tests(self, options, tmp_path, monkeypatch):
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

    def test_the_tests_begin_without_hypothesis(self):
        code = "import runpy, sys; sys.modules['hypothesis'] = None; runpy.run_path('tests/conftest.py')"
        done = subprocess.run([sys.executable, "-c", code], cwd=__main__.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_without_pytest_one_line_says_so(self, options, monkeypatch):
        monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
        (row,) = checks.pytest("cuda", options)
        assert row == {"benchmark": "skipped", "reason": "pytest is not installed"}

    def test_sanitizers_give_a_row_each_whatever_becomes_of_the_others(self, options, tmp_path, monkeypatch):
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

    def test_small_cases_are_told_one_by_one(self, monkeypatch, capsys):
        cases = [("silu_mul", "fp32", {"rows": 2, "ffn": 8}), ("rms_norm", "fp32", {"rows": 2, "hidden": 8})]
        monkeypatch.setattr(small, "CASES", cases)
        monkeypatch.setattr(small, "failure", lambda op, *_, **__: "wrong" if op == "rms_norm" else "")
        assert small.main() == 1
        assert capsys.readouterr().out.splitlines() == [
            "1 of 2: silu_mul fp32 rows=2 ffn=8: right",
            "2 of 2: rms_norm fp32 rows=2 hidden=8: wrong",
            "1 of 2 cases are right",
        ]

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
    def test_a_sanitizers_verdict(self, code, output, passed):
        assert checks.verdict("memcheck", code, output)["passed"] is passed

    def test_a_sanitizer_that_did_not_run_is_no_pass(self):
        with pytest.raises(RuntimeError, match=r"memcheck did not run.*Device not supported"):
            checks.verdict("memcheck", 0, "========= Error: Device not supported\n========= ERROR SUMMARY: 0 errors\n")

    def test_without_the_sanitizer_its_case_is_skipped(self, options, monkeypatch):
        monkeypatch.setattr(checks, "_sanitizer", lambda: None)
        (row,) = checks.sanitize(options)
        assert row["benchmark"] == "skipped"


def test_the_compiled_decoder_decodes_like_ours():
    """Its logits along a text equal those of a forward pass over a chain."""
    _, model = tiny_model()
    text = [3, 1, 4, 1, 5, 9]
    rival = compiled.CompiledDecoder(model, batch=2, rows=16, compiled=False)
    ours = decoding.Decoder(model, None, Tree.from_choices([]), batch=2, max_seqlen=16)
    ours.start([text[:1], text[:1]], None)
    ours.cache.seqlens.zero_()
    for position, token in enumerate(text):
        ours.next_token.fill_(token)
        ours.step()
        rival.tokens.fill_(token)
        logits = rival.step()
        assert rival.position.item() == position + 1
        torch.testing.assert_close(logits, ours.logits[:, 0], rtol=1e-4, atol=1e-4)
        assert rival.tokens[:, 0].tolist() == ours.next_token.tolist()


class Eager(StandIn):
    """Where a graph must not hold the launch: the reference's reads values."""

    def capture(self, work):
        return work


@pytest.fixture
def no_device(fast, monkeypatch):
    """CUDA's events and graphs as the CPU would have them: in order, and at once."""

    class Nothing:
        def __init__(self, **_):
            self.at = time.perf_counter()

        def record(self):
            self.at = time.perf_counter()

        def synchronize(self):
            """All is done already."""

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Nothing)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    monkeypatch.setattr(decoding, "Cuda", lambda device: Eager())
    for name, value in (("STEPS", 4), ("GROUPS", 5), ("ROWS_SPARE", 128)):
        monkeypatch.setattr(decoding, name, value)
    monkeypatch.setattr(decoding, "CONTEXTS", (40, 80))
    checkpoint = geometry.RandomCheckpoint(checks.TINY, "cpu")
    model = Model(checkpoint, backend="reference", device=torch.device("cpu"), dtype="float32", max_positions=1024)
    monkeypatch.setattr(decoding, "model_of", lambda name: (checkpoint, model))


def test_steps_are_measured_beside_their_floors(no_device):
    rows = list(decoding.measure("vicuna-7b", 2, 40, own_lm_heads=False))
    assert [row["decoding"] for row in rows] == ["plain", *(f"{name}, acceptance replayed" for name in
                                                           replay.TOKENS_PER_STEP)]  # fmt: skip
    plain, first, second = rows
    assert plain["tokens_per_step"] == 1
    assert first["tokens_per_step"] == pytest.approx(2.565, abs=0.1)
    assert second["tokens_per_step"] == pytest.approx(3.47, abs=0.1)
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(2e6 * row["tokens_per_step"] / row["step_us"])
        assert row["times_floor"] == pytest.approx(row["step_us"] / row["floor_us"])
        assert row["times_weight_floor"] == pytest.approx(row["step_us"] / row["weight_floor_us"])
    weights, kv = geometry.weight_bytes(checks.TINY), geometry.kv_bytes(checks.TINY, 2 * 40)
    heads = geometry.heads_bytes(checks.TINY, own_lm_heads=False)
    assert plain["floor_us"] == pytest.approx((weights + kv) / 1e4)
    assert first["floor_us"] == pytest.approx((weights + kv + heads) / 1e4)
    assert first["overhead"] == pytest.approx(first["step_us"] / plain["step_us"])
    assert first["speedup"] == pytest.approx(first["tokens_per_second"] / plain["tokens_per_second"])


def test_a_context_that_does_not_fit_is_skipped(no_device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 10, 1 << 30))
    (row,) = decoding.measure("vicuna-7b", 1, 80, own_lm_heads=False)
    assert row["benchmark"] == "skipped"


def test_no_model_is_a_skip(options, tmp_path):
    (row,) = decoding_rivals.real(options)
    assert row == {"benchmark": "skipped", "reason": "no --model"}
    (row,) = decoding_rivals.real(dataclasses.replace(options, model=str(tmp_path / "none")))
    assert row["reason"].startswith("no model at")


def test_the_table_says_what_the_rows_say():
    step = {"benchmark": "step", "model": "vicuna-7b", "batch": 1, "context": 512, "step_us": 4000.0}
    rows = [
        {
            "benchmark": "kernel",
            "case": "attention a",
            "implementation": name,
            "op": "tree_attention",
            "us": us,
            "percent_of_floor": 81.4,
            "floor_us": 8.14,
        }
        for name, us in (("cuda", 10.0), ("sdpa", 25.0))
    ]
    rows += [
        {"benchmark": "kernel", "case": "attention a", "implementation": "flex", "failed": "no compiler"},
        step | {"decoding": "torch.compile", "tokens_per_second": 250.0},
        step | {"decoding": "medusa-1, acceptance replayed", "tokens_per_second": 641.0, "overhead": 1.14,
                "speedup": 2.25, "times_floor": 1.2, "times_weight_floor": 1.3, "engine_step_us": 4100.0,
                "own_lm_heads": True},
        {"benchmark": "check", "case": "memcheck", "passed": False, "detail": "3 errors"},
        {"benchmark": "check", "case": "tests on cuda", "passed": True, "passed_tests": 7, "failed_tests": 0},
        {"benchmark": "failure", "case": "trace", "error": "OutOfMemoryError"},
    ]  # fmt: skip
    rows += [
        {"benchmark": "kernel", "case": f"linear vicuna-7b {name} r64", "op": "linear", "us": us, "implementation": by,
         "percent_of_floor": 50.0, "floor_us": us / 2}
        for name in ("qkv", "down") for by, us in (("cuda", 40.0), ("torch", 30.0))
    ]  # fmt: skip
    rows.append(rows[0] | {"case": "attention b", "implementation": "triton"})
    text = report(rows)
    assert "attention b by triton                         10.0 us   81% | \n" in text
    assert "10.0 us   81% | sdpa 2.50x" in text
    assert "linear vicuna-7b r64, 2 matrices              80.0 us   50% | torch 0.75x" in text
    assert "attention a flex: no compiler" in text
    assert "641 tok/s | 1.30x weights 1.20x floor | engine 4.10 ms | overhead 1.14 speedup 2.25" in text
    assert "acceptance replayed (own LM heads)" in text
    assert "checks: 1 of 2 passed" in text
    assert "WRONG memcheck: 3 errors" in text
    assert "tests on cuda: 7 passed, 0 failed" in text
    assert "trace: OutOfMemoryError" in text


def test_a_device_names_its_file():
    assert __main__.slug("NVIDIA H200") == "nvidia-h200"
