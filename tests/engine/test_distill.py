"""Self-distillation: conversations depend on their seed alone, and their hidden rows are what the model computes."""

import itertools
from pathlib import Path

import pytest
import torch

from medusa_engine import distill
from medusa_engine.checkpoint import open_checkpoint
from medusa_engine.dataset import Conversation, read_shard, shard_paths, shard_size
from medusa_engine.distill import Writer, add_hidden, is_complete, write_conversations
from medusa_engine.model import Model
from medusa_engine.tokenizer import Tokenizer
from tests.engine.models import EOS, SPOKEN, random_model, save_model, token, write_counting


@pytest.fixture(scope="module")
def checkpoint(default_model):
    return open_checkpoint(default_model)


@pytest.fixture(scope="module")
def model(checkpoint):
    return Model(checkpoint, backend="auto", device=torch.device("cpu"), dtype="bfloat16", max_positions=512)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(distill, "MAX_USER_TOKENS", 24)
    monkeypatch.setattr(distill, "MAX_ANSWER_TOKENS", 12)


def first(model, checkpoint, slots, count, seed=0):
    return list(itertools.islice(Writer(model, checkpoint.tokenizer, slots).conversations(seed), count))


def test_conversations_do_not_depend_on_their_slot(model, checkpoint):
    few, many = (
        {tuple(c.ids.tolist()) for c in first(model, checkpoint, slots, count)} for slots, count in ((2, 4), (8, 16))
    )
    assert few <= many


def test_conversations_follow_the_chat_template(model, checkpoint):
    text = checkpoint.tokenizer.decode(first(model, checkpoint, 4, 1)[0].ids.tolist(), skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\n")
    assert text.count("<|im_start|>user\n") == 1
    assert text.count("<|im_end|>\n<|im_start|>assistant\n") == 1


def test_answers_are_greedy_and_hidden_rows_are_the_models(model, checkpoint):
    written = first(model, checkpoint, 4, 3)
    recomputed = add_hidden(model, [Conversation(c.ids, c.answer_start) for c in written])
    for mine, theirs in zip(written, recomputed, strict=True):
        assert mine.hidden.shape == (len(mine.answer), model.config.hidden_size)
        torch.testing.assert_close(mine.hidden.float(), theirs.hidden.float(), rtol=0.05, atol=0.05)
        logits, head = model.head(theirs.hidden.float())
        head()
        top = logits.topk(2, dim=1)
        clear = top.values[:, 0] - top.values[:, 1] > 0.1  # the hidden rows are stored in bf16
        assert torch.equal(top.indices[clear, 0], mine.answer[clear].long())


def test_shards_are_filled_and_resumed(model, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "SHARD_POSITIONS", 20)
    writer = Writer(model, checkpoint.tokenizer, 4)
    write_conversations(writer, tmp_path, 20, seed=0)
    (shard,) = shard_paths(tmp_path)
    before = shard.read_bytes()
    write_conversations(writer, tmp_path, 40, seed=0)
    assert len(shard_paths(tmp_path)) == 2
    assert shard.read_bytes() == before
    one, two = ({tuple(c.ids.tolist()) for c in read_shard(path)} for path in shard_paths(tmp_path))
    assert not one & two


def test_no_more_is_written_than_was_asked_for(model, checkpoint, tmp_path):
    writer = Writer(model, checkpoint.tokenizer, 4)
    write_conversations(writer, tmp_path, 30, seed=0)
    (path,) = shard_paths(tmp_path)
    conversations, written = shard_size(path)
    assert 30 <= written < 30 + distill.MAX_ANSWER_TOKENS
    assert (conversations, written) == (len(list(read_shard(path))), sum(len(c.answer) for c in read_shard(path)))
    assert is_complete(tmp_path, 30)
    assert not is_complete(tmp_path, 50)
    write_conversations(writer, tmp_path, 50, seed=0)
    assert len(shard_paths(tmp_path)) == 2
    assert is_complete(tmp_path, 50)


def test_there_are_enough_conversations_to_train_on(model, checkpoint, tmp_path):
    write_conversations(Writer(model, checkpoint.tokenizer, 2), tmp_path, 1, seed=0)
    assert [shard_size(path)[0] for path in shard_paths(tmp_path)] == [2]
    assert is_complete(tmp_path, 1)


def test_a_checkpoint_without_a_chat_template_is_refused(model, checkpoint, monkeypatch):
    monkeypatch.setattr(type(checkpoint.tokenizer), "has_chat_template", property(lambda self: False))
    with pytest.raises(ValueError, match="chat template"):
        Writer(model, checkpoint.tokenizer, 1)


def counting(folder, template, **config):
    """A Writer of the counting model."""
    opened = open_checkpoint(write_counting(folder, chat_template=template, **config))
    limit = opened.config.max_position_embeddings
    model = Model(opened, backend="cpu", device=torch.device("cpu"), dtype="float32", max_positions=limit)
    return Writer(model, opened.tokenizer, 3)


def turns(before="", after=" stop"):
    return f"{{% for m in messages %}}{before}{{{{ m.content }}}}{after}{{% endfor %}}"


def test_a_template_may_begin_with_the_message(tmp_path):
    writer = counting(tmp_path, turns(after="T"))
    for conversation in itertools.islice(writer.conversations(0), 8):
        assert token("T") in conversation.ids.tolist()[1 : conversation.answer_start]
        assert len(conversation.hidden) == len(conversation.answer)


@pytest.mark.parametrize(
    "template",
    [turns(after=""), turns(after="{{ m.content }}"), "no message"],
    ids=["nothing behind", "twice", "never"],
)
def test_a_template_that_does_not_say_where_a_message_ends_is_refused(template, tmp_path):
    with pytest.raises(ValueError, match=r"holds a user's message once and puts something behind it; pass .* --data"):
        counting(tmp_path, template)


def test_a_short_context_shortens_the_conversations(tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "MAX_ANSWER_TOKENS", 99)
    writer = counting(tmp_path, turns(before="the "), max_position_embeddings=48)
    found = list(itertools.islice(writer.conversations(0), 20))
    assert 30 < max(len(c.ids) for c in found) <= 48
    with pytest.raises(ValueError, match=r"room for 32 tokens beside the chat template's 9, and the model's context"):
        counting(tmp_path, turns(before="the "), max_position_embeddings=36)


def test_the_tokenizers_end_of_text_ends_an_answer_where_the_config_names_none(tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "MAX_ANSWER_TOKENS", len(SPOKEN) + 8)
    writer = counting(tmp_path, turns(after="T"), eos_token_id=None)
    for conversation in itertools.islice(writer.conversations(0), 6):
        answer = conversation.answer.tolist()
        assert answer[0] == token("U")
        assert answer.index(EOS) == len(answer) - 1


def test_a_conversation_is_what_the_chat_template_encodes_to(pieces, tmp_path):
    """SentencePiece puts a space before whatever it encodes: its parts are not the whole's."""
    tokens, scores, types = pieces
    fields = {
        "model": "llama", "tokens": tokens, "scores": scores, "token_type": types,
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True,
    }  # fmt: skip
    tokenizer = Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in fields.items()}, Path("m.gguf"))
    tokenizer.chat_template = "{{ bos_token }}USER: {{ messages[0].content }} ASSISTANT:"
    folder = save_model(tmp_path, random_model("llama", vocab_size=len(tokens), max_position_embeddings=512))
    opened = open_checkpoint(folder)
    model = Model(opened, backend="cpu", device=torch.device("cpu"), dtype="float32", max_positions=512)
    writer = Writer(model, tokenizer, 1)
    for seed in range(8):
        slot = writer._begin(seed)
        message = tokenizer.decode(slot.ids).removeprefix("USER: ")
        assert slot.ids + writer._suffix == tokenizer.encode_chat(message)
    assert len({tuple(writer._begin(seed).ids) for seed in range(8)}) > 4
