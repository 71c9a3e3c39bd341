"""Head training: what is learnt, what a resumed run repeats, and what is written."""

import itertools
import json
import os
import signal

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import rms_norm

from medusa_engine.dataset import Conversation, read_shard, shard_paths, write_shard
from medusa_engine.heads_files import load_heads, save_heads
from medusa_engine.train import RANKS, Trainer, TrainOptions, most_frequent_tokens, saved_state

VOCAB, HIDDEN = 40, 24
OPTIONS = TrainOptions(heads=2, layers=1, draft_vocab=32, epochs=12, batch=128, learning_rate=5e-2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lm_head():
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def embedding():
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def conversations(lm_head):
    """Answers that count upwards modulo 30 from a random start: what a head must learn is a rotation of the LM head."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(150):
        start, length = torch.randint(30, (), generator=generator), int(torch.randint(3, 40, (), generator=generator))
        answer = (start + torch.arange(length)) % 30
        ids = torch.cat([torch.tensor([33, 34]), answer]).int()
        result.append(Conversation(ids, 2, lm_head[answer].bfloat16()))
    return result


def trained(folder, lm_head, embedding, conversations, options=OPTIONS):
    trainer = Trainer(folder, options, lm_head, embedding, conversations, CPU)
    trainer.run(lambda step, loss: None)
    return trainer


def test_heads_learn_the_tokens_that_follow(tmp_path, lm_head, embedding, conversations):
    result = trained(tmp_path, lm_head, embedding, conversations).result()
    assert result.block_weight.shape == (2, 1, HIDDEN, HIDDEN)
    for row in result.accuracy:
        assert row[0] > 0.9  # an untrained head repeats the current token and is never right
        assert sum(row) <= 1 + 1e-6
    assert result.metadata["paths"][:2] == [[0], [0, 0]]
    assert result.metadata["simulated_tokens_per_step"]["4"] > 2.5


def test_heads_that_are_told_the_root_learn_what_only_it_says(tmp_path, lm_head, embedding, conversations):
    """Hidden rows that say nothing: the next token can be had from the root alone."""
    blind = [Conversation(c.ids, c.answer_start, torch.ones_like(c.hidden)) for c in conversations]
    options = TrainOptions(**{**vars(OPTIONS), "soft_labels": 0.0})
    told = trained(tmp_path / "told", lm_head, embedding, blind, options).result()
    assert told.root_weight.shape == (HIDDEN, HIDDEN)
    assert told.accuracy[0][0] > 0.8
    untold = trained(tmp_path / "untold", lm_head, embedding, blind, TrainOptions(**{**vars(options), "root": False}))
    assert untold.result().root_weight is None
    assert untold.result().accuracy[0][0] < 0.2


def test_untrained_heads_are_the_base_model(tmp_path, lm_head, embedding, conversations):
    trainer = Trainer(tmp_path, OPTIONS, lm_head, embedding, conversations, CPU)
    hidden = torch.randn(5, HIDDEN)
    assert torch.equal(trainer.module(trainer.module.tell(hidden, torch.randn(5, HIDDEN)), 0), hidden)


@pytest.mark.parametrize("soft", [0.0, 0.4, 1.0])
def test_gradient_equals_autograd_on_the_definition(tmp_path, lm_head, embedding, conversations, soft):
    """Head h's target at row j: (1 - soft) x the token that row j + h + 1 chose + soft x that row's distribution."""
    options = TrainOptions(**{**vars(OPTIONS), "soft_labels": soft, "draft_vocab": 28})
    trainer = Trainer(tmp_path, options, lm_head, embedding, conversations, CPU)
    trainer.compute_dtype, trainer._lm_head = torch.float32, trainer._lm_head.float()
    group = sorted(trainer.train, key=lambda c: -len(c.answer))[:20]
    pieces = [(c, start) for c in group for start in range(0, len(c.answer) - 1, 7)]
    batch = trainer._batch(pieces, 7)
    generator = torch.Generator().manual_seed(2)
    guesses = [torch.randn(batch.hidden.shape, generator=generator, requires_grad=True) for _ in range(2)]
    losses, gradients = trainer._losses(batch, [x.detach() for x in guesses])
    for head, x in enumerate(guesses):
        total, count, at = 0.0, 0, 0
        for conversation, start in pieces:
            rows = len(conversation.answer[start : start + 7 + 2])
            for j in range(start, min(start + 7, len(conversation.answer) - 1 - head)):
                target = soft * (conversation.hidden[j + head + 1].float() @ trainer._lm_head.T).softmax(0)
                known = (trainer.token_map == conversation.answer[j + head + 1]).nonzero()
                if len(known):
                    target[known[0]] += 1 - soft
                total = total - (target * (x[at + j - start] @ trainer._lm_head.T).log_softmax(0)).sum()
                count += 1
            at += rows
        (total / count).backward()
        assert losses[head] == pytest.approx((total / count).item(), rel=1e-4)
        torch.testing.assert_close(gradients[head], x.grad, rtol=1e-3, atol=1e-7)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path, lm_head, embedding, conversations):
    whole = trained(tmp_path / "whole", lm_head, embedding, conversations)

    class Stop(Exception):
        pass

    def stop(step, loss):
        if step == 7:
            raise Stop

    broken = Trainer(tmp_path / "broken", OPTIONS, lm_head, embedding, conversations, CPU)
    with pytest.raises(Stop):
        broken.run(stop)
    resumed = Trainer(tmp_path / "broken", OPTIONS, lm_head, embedding, conversations, CPU)
    assert resumed.step == 7
    resumed.run(lambda step, loss: None)
    for mine, theirs in zip(resumed.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, whole.total_steps + 1))


def test_ctrl_c_between_the_parts_of_an_update_waits_for_its_end(tmp_path, lm_head, embedding, conversations):
    whole = trained(tmp_path / "whole", lm_head, embedding, conversations)
    trainer = Trainer(tmp_path / "broken", OPTIONS, lm_head, embedding, conversations, CPU)
    matrices, _ = trainer._optimizer._parts
    update, steps = matrices.step, itertools.count(1)

    def interrupted():
        update()
        if next(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    matrices.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.run(lambda step, loss: None)
    resumed = Trainer(tmp_path / "broken", OPTIONS, lm_head, embedding, conversations, CPU)
    assert resumed.step == 5
    resumed.run(lambda step, loss: None)
    for mine, theirs in zip(resumed.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_log_without_its_run_is_not_gone_on_with(tmp_path, lm_head, embedding, conversations):
    (tmp_path / "log.jsonl").write_text('{"step": 99, "loss": 99.0}\n')
    trainer = trained(tmp_path, lm_head, embedding, conversations)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, trainer.total_steps + 1))


def test_on_another_text_training_begins_anew(tmp_path, lm_head, embedding, conversations):
    trained(tmp_path / "changed", lm_head, embedding, conversations[:60])
    changed = Trainer(tmp_path / "changed", OPTIONS, lm_head, embedding, conversations, CPU)
    assert changed.begins_anew
    assert changed.step == 0
    changed.run(lambda step, loss: None)
    fresh = trained(tmp_path / "fresh", lm_head, embedding, conversations)
    for mine, theirs in zip(changed.module.parameters(), fresh.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("changed", "fresh")]
    assert logs[0] == logs[1]
    assert not Trainer(tmp_path / "changed", OPTIONS, lm_head, embedding, conversations, CPU).begins_anew


def test_a_run_with_other_options_is_refused(tmp_path, lm_head, embedding, conversations):
    trained(tmp_path, lm_head, embedding, conversations)
    other = TrainOptions(**{**vars(OPTIONS), "epochs": 5})
    with pytest.raises(ValueError, match="another epochs"):
        Trainer(tmp_path, other, lm_head, embedding, conversations, CPU)


def test_one_conversation_is_too_few(tmp_path, lm_head, embedding, conversations):
    with pytest.raises(ValueError, match="at least two conversations"):
        Trainer(tmp_path, OPTIONS, lm_head, embedding, conversations[:1], CPU)


def test_answers_of_one_token_are_too_short(tmp_path, lm_head, embedding, conversations):
    short = [Conversation(c.ids[:3], 2, c.hidden[:1]) for c in conversations]
    with pytest.raises(ValueError, match="an answer of at least two tokens"):
        Trainer(tmp_path, OPTIONS, lm_head, embedding, short, CPU)


def test_a_pytorch_without_the_optimizer_is_named(tmp_path, lm_head, embedding, conversations, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"training needs torch >= 2\.9, .* and this is"):
        Trainer(tmp_path, OPTIONS, lm_head, embedding, conversations, CPU)


@pytest.mark.parametrize("content", [b"", b"no state", None])
def test_a_damaged_state_is_named(content, tmp_path):
    path = tmp_path / "state.pt"
    if content is None:
        torch.save({"step": 3}, path)
    else:
        path.write_bytes(content)
    for mmap in (False, True):
        with pytest.raises(ValueError, match=r"state\.pt cannot be read as a run to go on with: [^\n]*$"):
            saved_state(tmp_path, OPTIONS, mmap=mmap)


def test_ranks_name_the_place_of_the_right_token(tmp_path, lm_head, embedding, conversations):
    trainer = trained(tmp_path, lm_head, embedding, conversations)
    conversation = trainer.held_out[0]
    ranks = trainer.ranks(conversation)
    answer = conversation.answer.long()
    for head in range(2):
        told = trainer.module.tell(conversation.hidden.float(), rms_norm(embedding[answer], (HIDDEN,), eps=1e-6))
        logits = trainer.module(told, head).to(trainer.compute_dtype) @ trainer._lm_head.T
        order = trainer.token_map[logits.float().argsort(dim=1, descending=True)].long()
        for position in range(len(answer)):
            if position + 1 + head >= len(answer):
                assert ranks[head, position] == RANKS
            else:
                place = (order[position] == answer[position + 1 + head]).nonzero().item()
                assert ranks[head, position] == min(place, RANKS)


def test_most_frequent_tokens_are_ascending_and_ties_take_the_lower_id():
    conversations = [Conversation(torch.tensor([9, 5, 5, 3, 7, 3], dtype=torch.int32), 1)]
    assert most_frequent_tokens(conversations, 2, 10).tolist() == [3, 5]
    assert most_frequent_tokens(conversations, 4, 10).tolist() == [0, 3, 5, 7]
    assert most_frequent_tokens(conversations, 99, 10).tolist() == list(range(10))


def test_shards_round_trip(tmp_path, conversations):
    write_shard(tmp_path / "shard-0000.safetensors", conversations[:5])
    assert shard_paths(tmp_path) == [tmp_path / "shard-0000.safetensors"]
    for read, written in zip(read_shard(shard_paths(tmp_path)[0]), conversations[:5], strict=True):
        assert torch.equal(read.ids, written.ids)
        assert read.answer_start == written.answer_start
        assert torch.equal(read.hidden, written.hidden)


@pytest.mark.parametrize("content", [b"", b"not a shard", None])
def test_damaged_shards_are_named(tmp_path, content):
    path = tmp_path / "shard-0000.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-0000\.safetensors cannot be read"):
        list(read_shard(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.tensor([3, -1, 5, 6])}, "holds token id -1; ids are 0 or higher"),
        ({"ids": torch.ones(4)}, "must be integers in one dimension"),
        ({"lengths": torch.tensor([4, 4])}, "with a length and an answer_start for each conversation"),
        ({"lengths": torch.tensor([9])}, "the lengths, 9 in all, must add up to its 4 ids"),
        ({"answer_starts": torch.tensor([0])}, "an answer must start behind a prompt's first token"),
        ({"answer_starts": torch.tensor([4])}, "and before its conversation's end"),
        ({"hidden": torch.ones(1, 8)}, r"hidden rows of shape \(1, 8\); it must be \(2, hidden_size\)"),
    ],
)
def test_shards_that_contradict_themselves_are_named(change, message, tmp_path):
    shard = {"ids": torch.arange(4), "lengths": torch.tensor([4]), "answer_starts": torch.tensor([2])}
    save_file({**shard, **change}, tmp_path / "shard.safetensors")
    with pytest.raises(ValueError, match=message):
        list(read_shard(tmp_path / "shard.safetensors"))


def test_saved_heads_load_again(tmp_path, lm_head, embedding, conversations):
    found = trained(tmp_path / "run", lm_head, embedding, conversations).result()
    save_heads(tmp_path / "heads", found)
    loaded = load_heads(tmp_path / "heads", hidden_size=HIDDEN, vocab_size=VOCAB)
    assert torch.equal(loaded.block_weight, found.block_weight.bfloat16())
    assert torch.equal(loaded.token_map, found.token_map)
    assert torch.equal(loaded.root_weight, found.root_weight.bfloat16())
    assert loaded.metadata["paths"] == found.metadata["paths"]
