"""`medusa train` from the command line: data without hidden rows in, loadable heads and a loss curve out."""

import importlib.util
import json

import pytest
import torch

from medusa_engine import Medusa, training_run
from medusa_engine.dataset import Conversation, write_shard

from .models import SPOKEN, counting_folder, write_counting


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts of the counting model: every answer counts on from its prompt's last token."""
    folder = tmp_path_factory.mktemp("data")
    starts = torch.randint(3, len(SPOKEN) - 1, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    conversations = [Conversation(((start + torch.arange(24)) % len(SPOKEN)).int(), 2) for start in starts]
    write_shard(folder / "shard-0000.safetensors", conversations)
    return folder


@pytest.fixture
def train(medusa, data):
    """train(folder, *options) -> exit code, standard output, standard error."""
    common = ["--model", counting_folder(), "--draft-vocab", 9999, "--num-heads", 2, "--epochs", 12, "--batch", 64]
    common += ["--learning-rate", 0.05, "--device", "cpu", "--data", data]
    return lambda folder, *options: medusa("train", folder, *common, *options)


def test_trained_heads_speed_up_their_model(train, tmp_path):
    code, out, _ = train(tmp_path, "--json")
    summary = json.loads(out)
    assert code == 0
    assert summary["accuracy"][0][0] > 0.9
    assert (tmp_path / "heads" / "loss.png").read_bytes().startswith(b"\x89PNG")
    curve = json.loads((tmp_path / "heads" / "loss.json").read_text())
    assert curve[-1][1] < 0.5 * curve[0][1]
    engine = Medusa.from_pretrained(tmp_path / "heads", tree=4, dtype="float32", device="cpu")
    prompt = [5, 6]
    plain, fast = (engine.generate(prompt, 20, medusa=m, ignore_eos=True) for m in (False, True))
    assert fast.token_ids == plain.token_ids
    assert fast.stats.tokens_per_step > 2


def test_a_finished_run_is_not_trained_again(train, tmp_path):
    train(tmp_path)
    log = tmp_path / "run" / "log.jsonl"
    steps = [line for line in log.read_text().splitlines() if '"loss"' in line]
    train(tmp_path)
    assert [line for line in log.read_text().splitlines() if '"loss"' in line] == steps


def test_on_more_text_training_begins_anew_and_says_so(train, data, tmp_path):
    _, _, err = train(tmp_path / "heads")
    assert "anew" not in err
    more = tmp_path / "more"
    more.mkdir()
    shard = (data / "shard-0000.safetensors").read_bytes()
    for name in ("shard-0000.safetensors", "shard-0001.safetensors"):
        (more / name).write_bytes(shard)
    code, _, err = train(tmp_path / "heads", "--data", more)
    assert code == 0
    assert "of another text: training begins anew" in err


def test_without_matplotlib_the_heads_are_trained_and_the_curve_is_data(train, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = train(tmp_path, "--epochs", 1)
    assert code == 0
    assert err.startswith("matplotlib is missing: the loss curve will be data without a PNG; `pip install ")
    assert out.endswith(f"heads written to {tmp_path / 'heads'}\n")
    assert (tmp_path / "heads" / "loss.json").exists()
    assert not (tmp_path / "heads" / "loss.png").exists()


NUMBERS = ("positions", "num-heads", "num-layers", "draft-vocab", "epochs", "batch", "slots")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(([f"--{name}", value], f"{value} is not in the range x>=1") for name in NUMBERS for value in ("0", "-5")),
        (["--learning-rate", "0"], "0.0 is not in the range x>0"),
        (["--learning-rate", "inf"], "inf is no finite number"),
        (["--weight-decay", "-1"], "-1.0 is not in the range x>=0"),
        (["--soft-labels", "nan"], "nan is no finite number"),
        (["--seed", "-1"], "-1 is not in the range 0<=x<="),
        (["--device", "toaster"], "device must be a CPU or CUDA device, not 'toaster'"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--data", "/no/such"], "'/no/such' does not exist"),
    ],
    ids=lambda case: " ".join(case) if isinstance(case, list) else None,
)
def test_a_mistake_costs_no_model(options, message, train, tmp_path, monkeypatch):
    monkeypatch.setattr(training_run, "open_checkpoint", None)
    code, out, err = train(tmp_path, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_folders_that_cannot_be_written_to_are_said_first(train, tmp_path, monkeypatch):
    monkeypatch.setattr(training_run, "open_checkpoint", None)
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "heads").touch()
    for folder, where in ((tmp_path / "file" / "new", "new"), (tmp_path / "run", "heads")):
        code, _, err = train(folder)
        assert (code, err.count("\n")) == (2, 1)
        assert f"{where} cannot be written to as a folder: Not a directory" in err


def test_another_runs_folder_is_refused_first(train, tmp_path, monkeypatch):
    train(tmp_path, "--epochs", 1)
    monkeypatch.setattr(training_run, "open_checkpoint", None)
    code, _, err = train(tmp_path, "--epochs", 2)
    assert (code, err.count("\n")) == (2, 1)
    assert "is of a run with another epochs: use another folder, or the same options" in err


def test_another_models_folder_is_refused(train, tmp_path):
    train(tmp_path / "run", "--epochs", 1)
    other = write_counting(tmp_path / "other", peak=19.0)
    code, _, err = train(tmp_path / "run", "--epochs", 1, "--model", other)
    assert (code, err.count("\n")) == (2, 1)
    assert f"run is of another model, '{counting_folder()}': use another folder" in err


def test_heads_find_their_model_from_everywhere(train, tmp_path, monkeypatch):
    write_counting(tmp_path / "counting")
    monkeypatch.chdir(tmp_path)
    assert train("run", "--epochs", 1, "--model", "counting")[0] == 0
    monkeypatch.chdir("/")
    assert Medusa.from_pretrained(tmp_path / "run" / "heads", dtype="float32", device="cpu").heads.num_heads == 2


def test_a_line_of_the_log_that_was_cut_short_is_passed_over(train, tmp_path):
    train(tmp_path, "--epochs", 1)
    before = json.loads((tmp_path / "heads" / "loss.json").read_text())
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"step": 3, "lo')
    assert train(tmp_path, "--epochs", 1)[0] == 0
    assert json.loads((tmp_path / "heads" / "loss.json").read_text()) == before


def test_data_that_cannot_be_trained_on_is_named(train, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    ids = torch.arange(24).int()
    hidden = torch.zeros(22, 3)
    unfit = {
        "no shard": None,
        "1 conversation; training needs 2": [Conversation(ids, 2)],
        "no answer of two tokens": [Conversation(ids, 23)] * 2,
        "token id 999": [Conversation(torch.full((9,), 999).int(), 2)] * 2,
        "hidden rows of 3 numbers": [Conversation(ids, 2, hidden)] * 2,
    }
    for number, (message, conversations) in enumerate(unfit.items()):
        path = empty
        if conversations:
            path = tmp_path / f"{number}.safetensors"
            write_shard(path, conversations)
        code, _, err = train(tmp_path / "run", "--data", path)
        assert (code, err.count("\n")) == (2, 1)
        assert f"{path} holds" in err
        assert message in err


def test_a_bug_in_training_shows_its_traceback(train, tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr(training_run.Trainer, "run", broken)
    with pytest.raises(ValueError, match="a bug"):
        train(tmp_path)
