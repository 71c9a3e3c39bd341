"""Options of the command line: what is refused before any work, in one line and with exit code 2."""

import os

import pytest

from medusa_engine import Medusa, cli_options
from medusa_engine.cli_options import parse_tree
from medusa_engine.model import DTYPES
from medusa_kernels.verify_tree import BACKENDS, MODES
from tests.engine.models import FOLDER, counting_heads_folder, write_counting

MODEL = ["--model", str(write_counting(FOLDER / "cli-options", max_position_embeddings=1024)), "--dtype", "float32"]
HEADS = ["--heads", str(counting_heads_folder()), "--tree", "chain-3"]
RIGHT = ["generate", "a", *MODEL, *HEADS]


def test_parse_tree():
    assert [parse_tree(t) for t in ("auto", "16", "4x3x2", "[[0], [1]]")] == ["auto", 16, "4x3x2", [[0], [1]]]


def test_sources_may_have_choices():
    words = "medusa@[[0],[0,0]],prompt-lookup,medusa@4,medusa@[[0],[1]]"
    found = cli_options.DraftWords().convert(words, None, None)
    assert found == [("medusa", [[0], [0, 0]]), ("prompt-lookup", "auto"), ("medusa", 4), ("medusa", [[0], [1]])]


def test_words_are_those_of_the_engine():
    assert cli_options.MODES == MODES
    assert set(cli_options.DTYPES) == set(DTYPES)
    assert {"auto", *BACKENDS} == set(cli_options.BACKENDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--model", "/no/such"], "/no/such: no such file or folder"),
        (["generate", "a", *MODEL], "this model has no Medusa heads"),
        (["generate", "a", *MODEL, "--heads", "/no/such"], "no heads at /no/such"),
        ([*RIGHT, "-n", "5000"], "prompt of 1 tokens + max_new_tokens 5000 exceeds max_seqlen 1024"),
        ([*RIGHT, "-n", "5000", "--json"], "prompt of 1 tokens + max_new_tokens 5000 exceeds max_seqlen 1024"),
        ([*RIGHT, "--max-seqlen", "9999"], "max_seqlen 9999 is more than the model allows"),
        ([*RIGHT, "--device", "toaster"], "device must be a CPU or CUDA device"),
        ([*RIGHT, "--draft", "prompt-lookup"], "heads are for draft='medusa'"),
        (["bench", *MODEL, *HEADS, "-n", "5000", "--limit", "1"], "exceeds max_seqlen 1024"),
        (["bench", *MODEL, "--drafts", "prompt-lookup,first-layers:9"], "asks for 9 layers; the model has 1 to"),
    ],
    ids=lambda case: " ".join(case[:2] + case[-2:]) if isinstance(case, list) else None,
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, medusa):
    code, out, err = medusa(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("medusa: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["--frobnicate"], "No such option"),
        (["generate"], "Missing argument 'PROMPT'"),
        (["generate", "a", "b"], "unexpected extra argument"),
        (["generate", "a", "-n", "many"], "'many' is not a valid integer"),
        (["generate", ""], "Invalid value for 'PROMPT': it is empty"),
        (["generate", "a", "-n", "0"], "0 is not in the range x>=1"),
        (["generate", "a", "--max-seqlen", "1"], "1 is not in the range x>=2"),
        (["generate", "a", "--dtype", "int4"], "'int4' is not one of 'float32', 'bfloat16', 'float16', 'int8'"),
        (["generate", "a", "--backend", "tpu"], "'tpu' is not one of 'auto', 'reference', 'cpu', 'cuda', 'triton'"),
        (["generate", "a", "--draft", "magic"], "draft must be 'medusa', 'prompt-lookup', 'first-layers:N' or"),
        (["generate", "a", "--tree", "oak"], "name 'oak' is no known tree"),
        (["generate", "a", "--tree", "[[0]"], "'[[0]' is no valid JSON list of choices"),
        (["generate", "a", "--tree", "[0]"], "choices[0] is int 0"),
        (["generate", "a", "--tree", "[[0, 0]]"], "its parent [0] is missing"),
        (["generate", "a", "--tree", "0"], "between 1 and 256, not 0"),
        (["generate", "a", "--tree", "dynamic-999"], "between 1 and 256, not 999"),
        (
            ["generate", "a", "--tree", "dynamic-8", "--draft", "prompt-lookup"],
            "needs the probabilities of Medusa heads",
        ),
        (["generate", "a", "--temperature", "0.7"], "use mode='lossless' to sample"),
        (["generate", "a", "--temperature", "nan"], "nan is no finite number"),
        (
            ["generate", "a", "--mode", "lossless", "--temperature", "1e-9"],
            "temperature must be 0 (greedy) or at least",
        ),
        (["generate", "a", "--mode", "lossless", "--top-p", "0"], "0.0 is not in the range 0<x<=1"),
        (["generate", "a", "--mode", "lossless", "--top-k", "-1"], "-1 is not in the range x>=0"),
        (["generate", "a", "--mode", "beam"], "'beam' is not one of 'greedy', 'typical', 'lossless'"),
        (["generate", "a", "--posterior-alpha", "0.2"], "--posterior-alpha has no effect with --mode greedy"),
        (["generate", "a", "--mode", "typical", "--posterior-threshold", "-1"], "-1.0 is not in the range x>=0"),
        (["generate", "a", "--stop", ""], "a text to end before must not be empty"),
        (["tree", "show"], "Missing argument 'NAME'"),
        (["tree", "show", "chain"], "name 'chain' is no known tree"),
        (["tree", "show", "[[0, 0]]"], "its parent [0] is missing"),
        (["tree", "show", "[[0]"], "no valid JSON list of choices"),
        (["bench", "--prompts", "/no/such"], "there is no file '/no/such'"),
        (["bench", "-n", "1"], "1 is not in the range x>=2"),
        (["bench", "--drafts", "medusa,oak@4"], "draft must be"),
        (["bench", "--drafts", "medusa@oak"], "name 'oak' is no known tree"),
        (["bench", "--drafts", "medusa", "--tree", "4"], "--tree cannot be given with --drafts"),
        (["generate", "a", "--compare", "--no-medusa"], "--no-medusa cannot be given with --compare"),
        (["calibrate", "--tree", "4"], "--tree has no effect here: the heads are measured, with trees of every size"),
        (["calibrate", "--draft", "prompt-lookup"], "--draft has no effect here"),
        (["bench", "--drafts", "medusa", "--draft", "medusa"], "--draft cannot be given with --drafts"),
        (["bench", "--output", f"{__file__}/rows.jsonl"], "test_cli_options.py is no folder"),
        (["verify", "--transformers", "--dtype", "int8"], "transformers has no weights of dtype 'int8'"),
        (["calibrate", "-n", "1"], "1 is not in the range x>=2"),
        (["calibrate", "--plot", f"{__file__}/a.png"], "test_cli_options.py is no folder"),
        (["trace", "a", "-o", "/no/such/page.html"], "there is no folder /no/such"),
        (["models", "remove"], "No such command 'remove'"),
    ],
    ids=lambda case: " ".join(case[:2] + case[-2:]) if isinstance(case, list) else None,
)
def test_what_the_words_alone_say_costs_no_model(arguments, message, medusa, monkeypatch):
    monkeypatch.setattr(Medusa, "from_pretrained", None)
    test_a_mistake_is_one_line_and_exit_code_2(arguments, message, medusa)


def test_a_file_that_may_not_be_written_is_said_before_any_work(medusa, monkeypatch, tmp_path):
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.setattr(Medusa, "from_pretrained", None)
    monkeypatch.setattr(os, "access", lambda *_: False)
    for path, there in ((tmp_path / "rows.jsonl", tmp_path / "rows.jsonl"), (tmp_path / "a" / "b.jsonl", tmp_path)):
        code, _, err = medusa("bench", "--output", path)
        assert (code, err.count("\n")) == (2, 1)
        assert f"{path} cannot be written: {there} does not permit it" in err


@pytest.mark.parametrize("error", [RuntimeError, TypeError])
def test_a_bug_is_not_called_a_mistake(error, medusa, monkeypatch):
    """Of loading, where what the user can get wrong is a ValueError."""

    def broken(*_, **__):
        raise error("a bug")

    monkeypatch.setattr(Medusa, "from_pretrained", broken)
    with pytest.raises(error, match="a bug"):
        medusa("generate", "a")
