"""`medusa verify`: what is equal, what is rounding, what is a bug, and the exit code that says which."""

import json
import sys
from functools import partial

import pytest
import torch

from medusa_engine import Medusa, divergence
from medusa_engine.decode import Decoder
from medusa_engine.divergence import (
    BITWISE,
    BUG,
    EQUAL,
    NEAR_TIE,
    Comparison,
    Run,
    Transformers,
    judge,
    our_runs,
    report,
    verify,
)
from medusa_engine.heads_files import save_heads
from tests.engine.models import (
    PROMPTS,
    continuation,
    counting_folder,
    counting_heads_folder,
    fitted_heads,
    random_folder,
    random_model,
)

ROUNDING = 1e-2


def rows(*values: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(value) for value in values]


REFERENCE = Run([0, 1, 2], rows([9, 0, 0], [0, 9, 0], [0, 8.99, 9]))


@pytest.mark.parametrize(
    ("other", "verdict", "position", "tokens", "margin"),
    [
        (REFERENCE, BITWISE, None, (), None),
        (Run([0, 1, 2], [None, *REFERENCE.logits[1:]]), BITWISE, None, (), None),
        (Run([0, 1, 2], rows([9.01, 0, 0], [0, 9, 0], [0, 8.99, 9])), EQUAL, None, (), None),
        (Run([0, 1, 2], rows([9.2, 0, 0], [0, 9, 0], [0, 8.99, 9])), BUG, None, (), None),
        (Run([0, 1, 1], rows([9, 0, 0], [0, 9, 0], [0, 9, 8.995])), NEAR_TIE, 2, (2, 1), 0.01),
        (Run([0, 1, 1], [*REFERENCE.logits[:2], None]), NEAR_TIE, 2, (2, 1), 0.01),
        # the same logits, yet another token: whoever took it did not take the best
        (Run([0, 1, 1], REFERENCE.logits), BUG, 2, (2, 1), 0.01),
        (Run([0, 0, 2], [*rows([9, 0, 0]), None, *rows([0, 0, 9])]), BUG, 1, (1, 0), 9.0),
        (Run([0, 1, 0], rows([9, 0, 0], [0, 9, 0], [9.5, 8.99, 9])), BUG, 2, (2, 0), 9.0),
        # logits that were off before the texts part
        (Run([0, 1, 1], rows([9, 0, 0.5], [0, 9, 0], [0, 9, 8.995])), BUG, 2, (2, 1), 0.01),
        (Run([0, 1], REFERENCE.logits[:2]), BUG, 2, (2, None), None),
        (Run([0, 1, 2, 0], [*REFERENCE.logits, torch.ones(3)]), BUG, 3, (None, 0), None),
        (Run([0, 1, 2], rows([9, 0, 0], [0, 9, float("nan")], [0, 8.99, 9])), BUG, None, (), None),
    ],
)
def test_judge(other, verdict, position, tokens, margin):
    found = judge(REFERENCE, other, ROUNDING)
    assert (found.verdict, found.position, found.tokens) == (verdict, position, tokens)
    assert found.margin == (None if margin is None else pytest.approx(margin, rel=1e-3))


def test_judge_without_logits_to_look_at():
    """The first token's logits stay inside our prefill: if it differs there is no near-tie to be seen."""
    hidden = Run([0], [None])
    assert judge(hidden, Run([0], [None]), ROUNDING).verdict == BITWISE
    assert judge(hidden, Run([1], [None]), ROUNDING).verdict == BUG


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A random Llama with heads that are right now and then."""
    heads = tmp_path_factory.mktemp("heads")
    save_heads(heads, fitted_heads(random_model("llama"), PROMPTS, num_heads=3), dtype=torch.float32)
    return Medusa.from_pretrained(random_folder(), heads, dtype="float32", tree="3x2x1")


@pytest.mark.parametrize("medusa", [False, True])
def test_runs_are_what_generate_says_and_their_logits_those_of_the_model(engine, medusa):
    model = random_model("llama")
    runs = our_runs(engine, PROMPTS, 20, medusa=medusa)
    assert [run.token_ids for run in runs] == engine.generate(PROMPTS, 20, medusa=medusa).token_ids
    for prompt, run in zip(PROMPTS, runs, strict=True):
        expected, logits = continuation(model, prompt, 20)
        assert run.token_ids == expected
        assert run.logits[0] is None
        torch.testing.assert_close(torch.stack(run.logits[1:]), logits[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_equal_to_plain_bit_for_bit_and_to_transformers_up_to_rounding(engine, batch):
    theirs = Transformers(random_folder(), engine)
    result = verify(engine, PROMPTS, 16, transformers=theirs, batch=batch)
    assert result["differences"] == []
    assert result["against"]["medusa"] == {BITWISE: 4, EQUAL: 0, NEAR_TIE: 0, BUG: 0, "max_logit_error": 0.0}
    counts = result["against"]["transformers"]
    assert counts[BITWISE] + counts[EQUAL] == 4
    assert 0 < counts["max_logit_error"] < 1e-5
    assert (result["verdict"], result["num_prompts"], result["batch"]) == (EQUAL, 4, batch)
    json.dumps(result)


def test_another_models_texts_are_bugs(engine):
    class Others:
        def run(self, prompt, max_new_tokens):
            return Run([1] * max_new_tokens, list(torch.eye(96)[1].repeat(max_new_tokens, 1)))

    result = verify(engine, PROMPTS, 6, transformers=Others())
    assert result["verdict"] == BUG
    assert result["against"]["transformers"][BUG] == 4
    assert result["against"]["medusa"][BITWISE] == 4
    assert [d["prompt"] for d in result["differences"]] == [0, 1, 2, 3]
    lines = report(result, ["p0", "p1", "p2", "p3"]).splitlines()
    first = result["differences"][0]
    ours = engine.generate(PROMPTS[0], 6, medusa=False).token_ids[first["position"]]
    assert lines[0].startswith(f"bug: prompt 0 (p0), token {first['position']}: transformers '丁' (1), plain decoding ")
    assert f"({ours}); margin 1, logit error " in lines[0]
    assert lines[4].startswith("plain decoding and Medusa, 4 prompts: 4 bitwise equal; largest logit error 0.0e+00")
    assert lines[5].startswith("transformers and plain decoding, 4 prompts: 4 bug; ")


def test_what_cannot_stand_beside_transformers(engine, monkeypatch):
    monkeypatch.setattr(engine, "dtype", "int8")
    with pytest.raises(ValueError, match="no weights of dtype 'int8'"):
        Transformers(random_folder(), engine)
    monkeypatch.setattr(engine, "dtype", "float32")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="needs `pip install transformers"):
        Transformers(random_folder(), engine)


# the command


@pytest.fixture
def command(medusa, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nM\n")
    common = ["--model", counting_folder(), "--heads", counting_heads_folder(), "--tree", "chain-3"]
    return partial(medusa, "verify", *common, "--dtype", "float32", "--prompts", prompts, "-n", 12)


def test_the_command_finds_no_difference(command):
    code, out, _ = command("--transformers")
    assert code == 0
    assert out.splitlines()[0].startswith("plain decoding and Medusa, 3 prompts: 3 bitwise equal")
    assert out.splitlines()[1].startswith("transformers and plain decoding, 3 prompts: 3 ")
    code, out, _ = command("--limit", "2", "--json")
    assert (code, json.loads(out)["verdict"], json.loads(out)["num_prompts"]) == (0, BITWISE, 2)
    assert list(json.loads(out)["against"]) == ["medusa"]


def test_the_command_finds_a_bug(command, monkeypatch):
    """Acceptance that takes one node too few yet keeps its next token: the classic off by one."""
    accept = Decoder.accept

    def wrong(self):
        accept(self)
        self.accept_length.clamp_(max=1)

    monkeypatch.setattr(Decoder, "accept", wrong)
    code, out, _ = command()
    assert code == 1
    assert out.startswith("bug: prompt 0 (a), token 2: plain decoding 'd' (4), Medusa ")
    code, out, _ = command("--json")
    assert (code, json.loads(out)["verdict"]) == (1, BUG)
    difference = json.loads(out)["differences"][0]
    assert (difference["prompt"], difference["against"], difference["position"]) == (0, "medusa", 2)
    assert difference["tokens"][0] == 4
    assert difference["spelled"][0] == "d"
    assert difference["margin"] > 1


def test_the_command_finds_logits_that_only_look_equal(command, monkeypatch):
    """On the cpu backend one flipped bit is a bug though every token is the same."""
    verify_step = Decoder.verify

    def wrong(self):
        verify_step(self)
        if self.tree.num_nodes > 1:
            logits = self.logits
            logits *= 1 + 1e-6

    monkeypatch.setattr(Decoder, "verify", wrong)
    code, out, _ = command()
    assert code == 1
    assert "bug: prompt 0 (a), plain decoding and Medusa: equal tokens, logit error " in out


def test_the_command_finds_near_ties_only(command, monkeypatch):
    tie = Comparison(NEAR_TIE, 4, (6, 7), 1e-5, 2e-6)
    monkeypatch.setattr(divergence, "judge", lambda *_: tie)
    code, out, _ = command("--limit", 1)
    assert code == 3
    assert out.splitlines()[0] == (
        "near-tie: prompt 0 (a), token 4: plain decoding 'f' (6), Medusa 'g' (7); margin 1e-05, logit error 2.0e-06"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "/no/such"], "there is no file '/no/such'"),
        (["--dtype", "int8", "--transformers"], "transformers has no weights of dtype 'int8'"),
        (["-n", "0"], "0 is not in the range x>=1"),
        (["-n", "500"], "exceeds max_seqlen"),
        (["--batch", "0"], "0 is not in the range x>=1"),
    ],
)
def test_mistakes(arguments, message, command):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert message in err
