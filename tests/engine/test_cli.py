"""The command line: its verbs and their help, what they print, and how they end. Mistakes: test_cli_options.py."""

import errno
import io
import json
import re
import resource
import shlex
import subprocess
import sys

import click
import pytest

from medusa_engine import Medusa, benchmark
from medusa_engine.cli import cli
from medusa_engine.decode import Decoder
from tests.engine.models import FOLDER, counting_heads_folder, spoken, write_counting

MODEL = ["--model", str(write_counting(FOLDER / "cli", max_position_embeddings=1024)), "--dtype", "float32"]
HEADS = ["--heads", str(counting_heads_folder()), "--tree", "chain-3"]


def commands(group: click.Group = cli, path: tuple[str, ...] = ()):
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())


def test_the_verbs():
    verbs = {(), ("tree",), ("tree", "show"), ("tree", "list"), ("models",), ("models", "fetch"), ("models", "list")}
    assert verbs | {("generate",), ("bench",), ("train",)} <= set(COMMANDS)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_shows_an_example_that_parses(path, medusa):
    code, out, err = medusa(*path, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: {' '.join(('medusa', *path))} [OPTIONS]")
    example = re.fullmatch(r"(?s).*\n  Example:\n    (medusa [^\n]*)\n", out)[1]
    words = shlex.split(example)[1:]
    assert words[: len(path)] == list(path)
    command = cli
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    command.make_context(
        "medusa", words, parent=cli.make_context("medusa", [])
    )  # raises for an option or argument that is not there
    assert medusa(*path, "-h")[1] == out


@pytest.mark.parametrize("path", [(), ("tree",), ("models",)], ids=" ".join)
def test_no_summary_is_cut(path, medusa):
    assert "..." not in medusa(*path, "--help")[1].split("Commands:")[1]


VERBS = [path for path, command in COMMANDS.items() if not isinstance(command, click.Group)]


@pytest.mark.parametrize("path", VERBS, ids=" ".join)
def test_every_verb_speaks_json(path):
    assert "--json" in [option for parameter in COMMANDS[path].params for option in parameter.opts]


@pytest.mark.parametrize("path", [(), ("tree",), ("models",)], ids=" ".join)
def test_a_group_without_a_verb_shows_its_help(path, medusa):
    assert medusa(*path) == medusa(*path, "--help")


def test_help_is_instant():
    """Under half a second of processor time, so whatever else the machine does; PyTorch alone would take more."""
    code = (
        "import sys; sys.argv = ['medusa', '--help']; from medusa_engine.cli import main\n"
        "try: main()\nfinally: print('torch' in sys.modules, 'numpy' in sys.modules, file=sys.stderr)"
    )
    times = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.stdout.startswith("Usage: ")
    assert done.stderr == "False False\n"
    assert min(times) < 0.5


# generate


def test_generate_prints_the_text_and_a_line_of_statistics(medusa):
    code, out, err = medusa("generate", "a", *MODEL, *HEADS, "-n", 21)
    assert (code, err) == (0, "")
    text, line = out.splitlines()
    assert text == spoken(range(2, 23))
    assert re.fullmatch(r"21 tokens, 5 steps, 4\.00 tokens per step, \d+\.\d tokens per second", line)


def test_generate_without_medusa(medusa):
    code, out, _ = medusa("generate", "a", *MODEL, "--no-medusa", "-n", 9)
    assert code == 0
    assert re.search(r"^bcdefghij\n9 tokens, 8 steps, 1\.00 tokens per step", out)
    assert medusa("generate", "a", *MODEL)[0] == 2


def test_generate_as_json(medusa):
    code, out, _ = medusa("generate", "a", *MODEL, *HEADS, "-n", 21, "--json")
    assert code == 0
    assert out.count("\n") == 1
    result = json.loads(out)
    assert result["text"] == spoken(range(2, 23))
    assert result["token_ids"] == list(range(2, 23))
    assert (result["finish_reason"], result["new_tokens"], result["steps"]) == ("length", 21, 5)
    assert result["tokens_per_step"] == 4.0
    assert result["tokens_per_second"] == pytest.approx(20 / result["decode_seconds"])
    assert result["prefill_seconds"] > 0


def test_compare(medusa):
    code, out, _ = medusa("generate", "a", *MODEL, *HEADS, "-n", 21, "--compare")
    assert code == 0
    assert out.count(spoken(range(2, 23)) + "\n") == 2
    assert out.index("── plain ") < out.index("20 steps, 1.00 tokens per step") < out.index("── medusa ")
    assert re.search(r"\nthe texts are equal; 4\.00 tokens per step; \d+\.\d\dx the speed\n$", out)
    code, out, _ = medusa("generate", "a", *MODEL, *HEADS, "-n", 21, "--compare", "--json")
    result = json.loads(out)
    assert (code, set(result)) == (0, {"plain", "medusa", "equal", "speedup"})
    assert result["equal"] is True
    assert result["plain"]["text"] == result["medusa"]["text"] == spoken(range(2, 23))
    assert (result["plain"]["steps"], result["medusa"]["steps"]) == (20, 5)
    speeds = [result[name]["tokens_per_second"] for name in ("medusa", "plain")]
    assert result["speedup"] == pytest.approx(speeds[0] / speeds[1])


def test_compare_of_a_text_too_short_to_time(medusa):
    code, out, _ = medusa("generate", "a", *MODEL, *HEADS, "-n", 1, "--compare")
    assert code == 0
    assert out.endswith("the texts are equal; 1.00 tokens per step; too short to time\n")
    assert json.loads(medusa("generate", "a", *MODEL, *HEADS, "-n", 1, "--compare", "--json")[1])["speedup"] is None


def test_compare_samples_both_texts_alike(medusa):
    options = ["-n", 9, "--compare", "--mode", "lossless", "--temperature", 5]
    assert "the texts are equal" in medusa("generate", "a", *MODEL, *HEADS, *options)[1]


def test_compare_says_when_the_texts_differ(medusa, monkeypatch):
    stream = Medusa.stream
    monkeypatch.setattr(Medusa, "stream", lambda self, p, medusa, **o: stream(self, "ab"[medusa], medusa=medusa, **o))
    code, out, _ = medusa("generate", "a", *MODEL, *HEADS, "-n", 9, "--compare")
    assert code == 0
    assert "\nTHE TEXTS DIFFER; " in out


def test_generate_reads_standard_input(medusa, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("xy"))
    assert medusa("generate", "-", *MODEL, *HEADS, "-n", 1)[1].startswith("z\n")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--stop", "f"], "bcde"),
        (["--stop", "never", "--stop", "de"], "bc"),
        (["-n", "4"], "bcde"),
        (["--tree", "[[0], [0, 0]]", "-n", "4"], "bcde"),
        (["--tree", "5", "-n", "4"], "bcde"),
        (["--backend", "reference", "-n", "4"], "bcde"),
        (["--device", "cpu", "--max-seqlen", "5", "-n", "4"], "bcde"),
        (["--mode", "lossless", "--temperature", "0.1", "--seed", "1", "-n", "4"], "bcde"),
        (["--mode", "lossless", "--top-k", "1", "--top-p", "0.5", "-n", "4"], "bcde"),
        (["--mode", "typical", "--posterior-threshold", "0.5", "--posterior-alpha", "0.9", "-n", "4"], "bcde"),
    ],
    ids=" ".join,
)
def test_options_of_generate(options, text, medusa):
    code, out, err = medusa("generate", "a", *MODEL, *HEADS, *options)
    assert (code, err) == (0, "")
    assert out.startswith(text + "\n")


def test_eos_and_chat(medusa, tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}T"
    folder = write_counting(tmp_path, chat_template=template)
    common = ["--model", folder, "--dtype", "float32", *HEADS, "--json", "-n", 4]
    assert json.loads(medusa("generate", "a", *common)[1])["text"] == "UV"
    assert json.loads(medusa("generate", "a", *common)[1])["finish_reason"] == "eos"
    assert json.loads(medusa("generate", "a", *common, "--ignore-eos")[1])["text"] == "UVa"
    assert json.loads(medusa("generate", "a", *common, "--no-chat")[1])["text"] == "bcde"


def test_a_seed_reproduces_a_text(medusa):
    hot = ["--mode", "lossless", "--temperature", 8, "--ignore-eos", "-n", 20, "--json"]
    seeds = (["--seed", 1], ["--seed", 1], ["--seed", 2], [])
    outs = [medusa("generate", "a", *MODEL, *HEADS, *hot, *seed)[1] for seed in seeds]
    ids = [tuple(json.loads(out)["token_ids"]) for out in outs]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


# models


def test_models(medusa, default_model, monkeypatch, tmp_path):
    assert medusa("models", "fetch") == (0, f"{default_model}\n", "")
    assert json.loads(medusa("models", "fetch", "--json")[1]) == {"path": str(default_model)}
    listed = json.loads(medusa("models", "list", "--json")[1])
    assert str(default_model) in [m["path"] for m in listed]
    assert all(m["bytes"] > 1e8 for m in listed if m["path"] == str(default_model))
    assert str(default_model) in medusa("models", "list")[1]
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path))
    assert medusa("models", "list") == (0, "no models; `medusa models fetch` installs the default\n", "")
    assert medusa("models", "list", "--json") == (0, "[]\n", "")


# what goes wrong


def test_no_network_is_a_clear_error(medusa, monkeypatch, tmp_path):
    from medusa_engine import default_model
    from medusa_engine.errors import ModelFetchError

    def fail(*_, **__):
        raise ModelFetchError("cannot download it: no network")

    monkeypatch.setattr(default_model, "default_model_path", fail)
    assert medusa("models", "fetch") == (2, "", "medusa: cannot download it: no network\n")


def test_ctrl_c(medusa, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Medusa, "from_pretrained", interrupted)
    code, _, err = medusa("generate", "a", *MODEL)
    assert (code, err.strip()) == (130, "medusa: interrupted")


@pytest.mark.parametrize("error", [TypeError, ValueError])
@pytest.mark.parametrize("verb", ["generate", "generate --json", "bench", "verify", "trace"])
def test_a_bug_in_a_step_shows_its_traceback(verb, error, medusa, monkeypatch, tmp_path):
    def broken(_):
        raise error("a bug")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Decoder, "propose", broken)
    name, *options = verb.split()
    what = ["a"] if name in ("generate", "trace") else ["--limit", "1"]
    with pytest.raises(error, match="a bug"):
        medusa(name, *what, *MODEL, *HEADS, "-n", 9, *options)


def test_a_full_disk_is_one_line_and_takes_no_result(medusa, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(benchmark, "append_row", full)
    (tmp_path / "prompts.txt").write_text("a\n")
    common = [*MODEL, *HEADS, "-n", 9, "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "rows.jsonl"]
    code, out, err = medusa("bench", *common, "--json")
    assert (code, json.loads(out)["num_prompts"]) == (2, 1)
    assert err == "medusa: [Errno 28] No space left on device\n"
