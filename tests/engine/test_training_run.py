"""`medusa train` from the command line: data without hidden rows in, loadable heads and a loss curve out."""

import json

import pytest
import torch
from click.testing import CliRunner

from medusa_engine import Medusa
from medusa_engine.cli import cli
from medusa_engine.dataset import Conversation, write_shard

from .models import SPOKEN, counting_folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts of the counting model: every answer counts on from its prompt's last token."""
    folder = tmp_path_factory.mktemp("data")
    starts = torch.randint(3, len(SPOKEN) - 1, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    conversations = [Conversation(((start + torch.arange(24)) % len(SPOKEN)).int(), 2) for start in starts]
    write_shard(folder / "shard-0000.safetensors", conversations)
    return folder


def train(folder, data, *extra):
    arguments = ["train", str(folder), "--model", str(counting_folder()), "--data", str(data), "--draft-vocab", "9999"]
    arguments += ["--num-heads", "2", "--epochs", "12", "--batch", "64", "--learning-rate", "0.05", "--device", "cpu"]
    return CliRunner().invoke(cli, [*arguments, *extra], catch_exceptions=False)


def test_trained_heads_speed_up_their_model(tmp_path, data):
    result = train(tmp_path, data, "--json")
    summary = json.loads(result.stdout.strip().splitlines()[-1])
    assert summary["accuracy"][0][0] > 0.9
    assert (tmp_path / "heads" / "loss.png").read_bytes().startswith(b"\x89PNG")
    curve = json.loads((tmp_path / "heads" / "loss.json").read_text())
    assert curve[-1][1] < 0.5 * curve[0][1]
    engine = Medusa.from_pretrained(tmp_path / "heads", tree=4, dtype="float32", device="cpu")
    prompt = [5, 6]
    plain, fast = (engine.generate(prompt, 20, medusa=m, ignore_eos=True) for m in (False, True))
    assert fast.token_ids == plain.token_ids
    assert fast.stats.tokens_per_step > 2


def test_a_finished_run_is_not_trained_again(tmp_path, data):
    train(tmp_path, data)
    log = tmp_path / "run" / "log.jsonl"
    steps = [line for line in log.read_text().splitlines() if '"loss"' in line]
    train(tmp_path, data)
    assert [line for line in log.read_text().splitlines() if '"loss"' in line] == steps


def test_an_empty_data_folder_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=r"data holds no shard-\*\.safetensors"):
        train(tmp_path / "run", tmp_path / "data")
