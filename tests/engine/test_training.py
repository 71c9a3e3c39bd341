"""Head training: what is learnt, what a resumed run repeats, and what is written."""

import json

import pytest
import torch

from medusa_engine.dataset import Conversation, read_shard, shard_paths, write_shard
from medusa_engine.heads_files import load_heads, save_heads
from medusa_engine.train import RANKS, Trainer, TrainOptions, most_frequent_tokens

VOCAB, HIDDEN = 40, 24
OPTIONS = TrainOptions(heads=2, layers=1, draft_vocab=32, epochs=12, batch=128, learning_rate=5e-2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lm_head():
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))


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


def trained(folder, lm_head, conversations, options=OPTIONS):
    trainer = Trainer(folder, options, lm_head, conversations, CPU)
    trainer.run(lambda step, loss: None)
    return trainer


def test_heads_learn_the_tokens_that_follow(tmp_path, lm_head, conversations):
    result = trained(tmp_path, lm_head, conversations).result()
    assert result.block_weight.shape == (2, 1, HIDDEN, HIDDEN)
    for row in result.accuracy:
        assert row[0] > 0.9  # an untrained head repeats the current token and is never right
        assert sum(row) <= 1 + 1e-6
    assert result.metadata["paths"][:2] == [[0], [0, 0]]
    assert result.metadata["simulated_tokens_per_step"]["4"] > 2.5


def test_untrained_heads_are_the_base_model(tmp_path, lm_head, conversations):
    trainer = Trainer(tmp_path, OPTIONS, lm_head, conversations, CPU)
    hidden = torch.randn(5, HIDDEN)
    assert torch.equal(trainer.module(hidden, 0), hidden)


@pytest.mark.parametrize("soft", [0.0, 0.4, 1.0])
def test_gradient_equals_autograd_on_the_definition(tmp_path, lm_head, conversations, soft):
    """Head h's target at row j: (1 - soft) x the token that row j + h + 1 chose + soft x that row's distribution."""
    options = TrainOptions(**{**vars(OPTIONS), "soft_labels": soft, "draft_vocab": 28})
    trainer = Trainer(tmp_path, options, lm_head, conversations, CPU)
    trainer.compute_dtype, trainer._lm_head = torch.float32, trainer._lm_head.float()
    group = sorted(trainer.train, key=lambda c: -len(c.answer))[:20]
    batch = trainer._batch(group)
    generator = torch.Generator().manual_seed(2)
    guesses = [torch.randn(batch.hidden.shape, generator=generator, requires_grad=True) for _ in range(2)]
    losses, gradients = trainer._losses(batch, [x.detach() for x in guesses])
    for head, x in enumerate(guesses):
        total, count, at = 0.0, 0, 0
        for conversation in group:
            for j in range(len(conversation.answer) - 1 - head):
                target = soft * (conversation.hidden[j + head + 1].float() @ trainer._lm_head.T).softmax(0)
                known = (trainer.token_map == conversation.answer[j + head + 1]).nonzero()
                if len(known):
                    target[known[0]] += 1 - soft
                total = total - (target * (x[at + j] @ trainer._lm_head.T).log_softmax(0)).sum()
                count += 1
            at += len(conversation.answer)
        (total / count).backward()
        assert losses[head] == pytest.approx((total / count).item(), rel=1e-4)
        torch.testing.assert_close(gradients[head], x.grad, rtol=1e-3, atol=1e-7)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path, lm_head, conversations):
    whole = trained(tmp_path / "whole", lm_head, conversations)

    class Stop(Exception):
        pass

    def stop(step, loss):
        if step == 7:
            raise Stop

    broken = Trainer(tmp_path / "broken", OPTIONS, lm_head, conversations, CPU)
    with pytest.raises(Stop):
        broken.run(stop)
    resumed = Trainer(tmp_path / "broken", OPTIONS, lm_head, conversations, CPU)
    assert resumed.step == 7
    resumed.run(lambda step, loss: None)
    for mine, theirs in zip(resumed.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, whole.total_steps + 1))


def test_a_run_with_other_options_is_refused(tmp_path, lm_head, conversations):
    trained(tmp_path, lm_head, conversations)
    other = TrainOptions(**{**vars(OPTIONS), "epochs": 5})
    with pytest.raises(ValueError, match="another epochs"):
        Trainer(tmp_path, other, lm_head, conversations, CPU)


def test_one_conversation_is_too_few(tmp_path, lm_head, conversations):
    with pytest.raises(ValueError, match="at least two conversations"):
        Trainer(tmp_path, OPTIONS, lm_head, conversations[:1], CPU)


def test_ranks_name_the_place_of_the_right_token(tmp_path, lm_head, conversations):
    trainer = trained(tmp_path, lm_head, conversations)
    conversation = trainer.held_out[0]
    ranks = trainer.ranks(conversation)
    answer = conversation.answer.long()
    for head in range(2):
        logits = trainer.module(conversation.hidden.float(), head).to(trainer.compute_dtype) @ trainer._lm_head.T
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


def test_saved_heads_load_again(tmp_path, lm_head, conversations):
    found = trained(tmp_path / "run", lm_head, conversations).result()
    save_heads(tmp_path / "heads", found)
    loaded = load_heads(tmp_path / "heads", hidden_size=HIDDEN, vocab_size=VOCAB)
    assert torch.equal(loaded.block_weight, found.block_weight.bfloat16())
    assert torch.equal(loaded.token_map, found.token_map)
    assert loaded.metadata["paths"] == found.metadata["paths"]
