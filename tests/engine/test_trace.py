"""`medusa trace`: what is recorded is what generation did, and why; the page holds it safely. In a browser:
test_trace_page.py.
"""

import json
import math
import re
from functools import partial

import pytest
import torch

from medusa_engine import Medusa
from medusa_engine.heads_files import save_heads
from medusa_engine.sampling import SamplingOptions
from medusa_engine.tokenizer import Tokenizer
from medusa_engine.trace import base_probabilities, histogram, label, page, reasons, record, summary
from medusa_kernels import Tree
from tests.engine.models import (
    EOS,
    PROMPTS,
    SPOKEN,
    counting_folder,
    counting_heads_folder,
    fitted_heads,
    random_folder,
    random_model,
    token,
    whole_logits,
    write_tokenizer,
)

CHOICES = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 0, 0]]
TYPICAL = SamplingOptions(mode="typical", temperature=6.0, posterior_threshold=0.02, posterior_alpha=0.5, seed=3)
LOSSLESS = SamplingOptions(mode="lossless", temperature=4.0, top_k=3, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def engine():
    heads = counting_heads_folder(patchy=True)
    return Medusa.from_pretrained(counting_folder(), heads, dtype="float32", tree=CHOICES)


def emitted(step: dict) -> list[int]:
    return [step["choice"][node] for node in step["path"]]


@pytest.mark.parametrize("options", [None, TYPICAL, LOSSLESS], ids=["greedy", "typical", "lossless"])
def test_the_steps_are_those_of_generate(engine, options):
    trace = record(engine, "a", 40, options)
    fields = {} if options is None else vars(options)
    out = engine.generate("a", 40, **fields)
    assert trace["token_ids"] == out.token_ids
    assert (trace["text"], trace["finish_reason"]) == (out.text, out.finish_reason)
    assert (trace["new_tokens"], trace["tokens_per_step"]) == (out.stats.new_tokens, out.stats.tokens_per_step)
    assert len(trace["steps"]) == out.stats.steps
    assert [trace["first"]["token"], *(t for s in trace["steps"] for t in s["tokens"])] == out.token_ids
    assert "".join([trace["first"]["text"], *(s["text"] for s in trace["steps"])]) == out.text
    root = trace["first"]["token"]
    for step in trace["steps"]:
        assert step["nodes"][0] == root
        assert step["tokens"] == emitted(step)[: len(step["tokens"])]
        assert len(step["tokens"]) + step["dropped"] == len(step["path"])
        assert [step["nodes"][node] for node in step["path"][1:]] == emitted(step)[:-1]
        root = emitted(step)[-1]
    assert any(len(step["path"]) > 1 for step in trace["steps"])
    assert any(len(step["path"]) < 5 for step in trace["steps"])
    json.dumps(trace, allow_nan=False)


def test_tokens_past_the_end_are_dropped(engine):
    trace = record(engine, [len(SPOKEN) - 5], 40)
    assert trace["finish_reason"] == "eos"
    assert trace["token_ids"][-1] == EOS
    assert trace["steps"][-1]["tokens"][-1] == EOS
    trace = record(engine, "a", 2)
    assert [len(step["tokens"]) for step in trace["steps"]] == [1]
    assert trace["steps"][0]["dropped"] == len(trace["steps"][0]["path"]) - 1


def test_head_probabilities(engine):
    """The heads' logits are sharp * 3, sharp * 2 and zeros where they are wrong, else sharp * 2 and zeros."""
    sharp = len(SPOKEN) ** 0.5
    right = math.exp(2 * sharp) / (math.exp(2 * sharp) + len(SPOKEN) - 1)
    scale = math.exp(3 * sharp) + math.exp(2 * sharp) + len(SPOKEN) - 2
    wrong = [math.exp(3 * sharp) / scale, math.exp(2 * sharp) / scale]
    last = token("a")
    for step in record(engine, "a", 30)["steps"]:
        for node, choice in enumerate(CHOICES, start=1):
            knows = len(choice) - 1 < last * 7 % 5
            first_two = [right, 1 / (math.exp(2 * sharp) + len(SPOKEN) - 1)] if knows else wrong
            assert step["draft"][node] == pytest.approx(first_two[choice[-1]], rel=2e-3)
        assert step["draft"][0] is None
        last = (emitted(step)[-1] - 1) % len(SPOKEN)


def test_base_probabilities_are_those_of_the_model(tmp_path):
    """Against transformers, one pass over each node's own line of tokens."""
    model = random_model("llama")
    save_heads(tmp_path, fitted_heads(model, PROMPTS, num_heads=3), dtype=torch.float32)
    engine = Medusa.from_pretrained(random_folder(), tmp_path, dtype="float32", tree="3x2x1")
    trace = record(engine, PROMPTS[0], 12)
    text = [*PROMPTS[0]]
    tree = trace["trees"][0]
    for step in trace["steps"]:
        for node in range(1, len(step["nodes"])):
            line = [step["nodes"][seen] for seen in tree["visible"][tree["parents"][node]]]
            row = whole_logits(model, [*text, *line])[-1].softmax(dim=-1)
            parent = tree["parents"][node]
            assert step["base"][node] == pytest.approx(row[step["nodes"][node]].item(), rel=1e-3)
            assert step["choice"][parent] == int(row.argmax())
            assert step["choice_probability"][parent] == pytest.approx(row.max().item(), rel=1e-3)
        text += [step["nodes"][node] for node in step["path"]]


def test_greedy_reasons(engine):
    seen = set()
    trace = record(engine, "a", 40)
    parents = trace["trees"][0]["parents"]
    for step in trace["steps"]:
        for node, why in enumerate(step["why"]):
            seen.add(why)
            right = node and step["choice"][parents[node]] == step["nodes"][node]
            if why == "accepted":
                assert right
                assert node in step["path"]
            elif why == "other":
                assert not right
                assert parents[node] in step["path"]
            elif why == "unreached":
                assert parents[node] not in step["path"]
            else:
                assert (why, node) == ("root", 0)
        assert step["floor"] is None
    assert seen == {"root", "accepted", "other", "unreached"}


def test_typical_reasons(engine):
    seen = set()
    for seed in range(6):
        trace = record(engine, "a", 40, SamplingOptions(**{**vars(TYPICAL), "seed": seed}))
        parents = trace["trees"][0]["parents"]
        for step in trace["steps"]:
            seen |= set(step["why"])
            for node, why in enumerate(step["why"][1:], start=1):
                enough = step["base"][node] > step["floor"][parents[node]]
                if why in ("accepted", "shorter"):
                    assert enough
                elif why == "threshold":
                    assert not enough
    assert {"root", "accepted", "threshold", "unreached"} <= seen


def test_reasons():
    parents = [-1, 0, 0, 1, 1, 2, 3]
    base = [None, 0.5, 0.4, 0.2, 0.7, 0.6, 0.9]
    words = ["root", "accepted", "other", "other", "accepted", "unreached", "unreached"]
    assert reasons(parents, [0, 1, 4], base, None) == words
    words = ["root", "accepted", "shorter", "threshold", "accepted", "shorter", "unreached"]
    assert reasons(parents, [0, 1, 4], base, [0.3] * 7) == words


def test_base_probabilities():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 5.0, 5.0]])

    def options(**fields) -> SamplingOptions:
        return SamplingOptions(**fields)

    torch.testing.assert_close(base_probabilities(logits, options()), logits.softmax(-1))
    hot = options(mode="lossless", temperature=2.0)
    torch.testing.assert_close(base_probabilities(logits, hot), (logits / 2).softmax(-1))
    cold = options(mode="typical", temperature=0.0, top_k=1)
    torch.testing.assert_close(base_probabilities(logits, cold), logits.softmax(-1))
    one = options(mode="lossless", top_k=1)
    assert base_probabilities(logits, one).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    judged = options(mode="typical", temperature=2.0, top_k=1)  # typical judges by the untruncated distribution
    torch.testing.assert_close(base_probabilities(logits, judged), (logits / 2).softmax(-1))


def test_histogram():
    tree = Tree.from_choices([[0], [1], [0, 0], [0, 1]])  # nodes 1, 2 and, below 1, 3, 4
    paths = [[0], [0, 1], [0, 2], [0, 1, 4], [0, 1, 4]]
    found = histogram([{"tree": 0, "path": path} for path in paths], [tree])
    assert found["accept_length"] == [1, 2, 2]
    # Head 2 is tried where head 1's guess 0 was accepted: below guess 1 stands nothing.
    assert found["heads"] == [{"tried": 5, "ranks": [3, 1]}, {"tried": 3, "ranks": [0, 2]}]
    assert histogram([], []) == {"accept_length": [0], "heads": []}


def test_plain_decoding_and_a_text_without_steps():
    engine = Medusa.from_pretrained(counting_folder(), counting_heads_folder(), dtype="float32", tree="root")
    trace = record(engine, "a", 5)
    assert [step["nodes"] for step in trace["steps"]] == [[i] for i in trace["token_ids"][:4]]
    assert trace["tokens_per_step"] == 1.0
    assert trace["histogram"] == {"accept_length": [4], "heads": []}
    assert trace["steps"][0]["draft"] == [None]
    trace = record(engine, "a", 1)
    assert (trace["steps"], trace["trees"], trace["first"]["text"]) == ([], [], "b")


def test_dynamic_trees():
    """A step's nodes stand in the tree that was grown for it, and the heads' probabilities are those of its ranks."""
    heads = counting_heads_folder(patchy=True)
    engine = Medusa.from_pretrained(counting_folder(), heads, dtype="float32", tree="dynamic-6")
    trace = record(engine, "a", 40)
    assert trace["token_ids"] == engine.generate("a", 40).token_ids
    assert len(trace["trees"]) > 1
    for step in trace["steps"]:
        tree = trace["trees"][step["tree"]]
        assert len(tree["parents"]) == len(step["nodes"]) == len(step["draft"]) == 6
        for node, parent in enumerate(tree["parents"][1:], start=1):
            assert tree["depths"][node] == tree["depths"][parent] + 1
            if tree["ranks"][node] == 0:
                assert step["draft"][node] > 0.9
            assert (step["why"][node] == "accepted") == (node in step["path"])
            right = step["choice"][parent] == step["nodes"][node]
            assert (step["why"][node] in ("accepted", "unreached")) or not right
    assert [tree["visible"][0] for tree in trace["trees"]] == [[0]] * len(trace["trees"])


def test_a_draft_without_probabilities():
    engine = Medusa.from_pretrained(counting_folder(), draft="prompt-lookup", dtype="float32", tree="chain-2")
    trace = record(engine, "abcdefghijklma", 8)
    assert all(step["draft"] == [None] * len(step["nodes"]) for step in trace["steps"])
    assert trace["tokens_per_step"] > 1


def test_one_prompt_only(engine):
    with pytest.raises(ValueError, match="trace takes one prompt"):
        record(engine, ["a", "b"])


def test_tracing_leaves_the_engine_as_it_was(engine):
    before = engine.generate("a", 20)
    record(engine, "M", 20)
    after = engine.generate("a", 20)
    assert (before.token_ids, before.stats.steps) == (after.token_ids, after.stats.steps)


def test_labels(tmp_path):
    pieces = ["<eos>", "a", " the", "\n", "\t", b"\xf0", b"\x9f", "é", b"\xa9"]
    write_tokenizer(tmp_path, pieces)
    tokenizer = Tokenizer.from_folder(tmp_path)
    labels = [label(tokenizer, i) for i in range(len(pieces))]
    assert labels == ["<eos>", "a", "␣the", "⏎", "⇥", "#5", "#6", "é", "#8"]


HOSTILE = "</script><script>document.title='broken'</script><!-- <b>&amp; \u2028 {{trace}}"


def embedded(html: str) -> dict:
    return json.loads(re.search(r'(?s)<script type="application/json" id="trace">(.*?)</script>', html)[1])


def test_the_page_holds_the_trace_whatever_the_text(engine):
    trace = {**record(engine, "a", 12), "prompt": HOSTILE}
    html = page(trace)
    assert embedded(html) == json.loads(json.dumps(trace))
    assert html.count("</script>") == 2


def test_the_page_asks_for_nothing_from_outside(engine):
    html = page(record(engine, "a", 5))
    assert "default-src 'none'" in html
    addresses = set(re.findall(r"https?://[^\s\"']+", html))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a namespace, never fetched
    assert not re.search(r"\b(?:src|href)=|@import|url\(", html)


# the command


@pytest.fixture
def command(medusa):
    model = ["--model", counting_folder(), "--heads", counting_heads_folder(), "--tree", "chain-3"]
    return partial(medusa, "trace", *model, "--dtype", "float32")


def test_the_command(command, tmp_path, monkeypatch):
    file = tmp_path / "page.html"
    code, out, _ = command("a", "-o", file, "-n", 9)
    assert (code, out) == (0, f"{file}: 9 tokens, 2 steps, 4.00 tokens per step\n")
    trace = embedded(file.read_text(encoding="utf-8"))
    assert (trace["prompt"], trace["text"], trace["mode"]) == ("a", "bcdefghij", "greedy")
    monkeypatch.chdir(tmp_path)
    code, out, _ = command("b", "-n", 9, "--mode", "lossless", "--temperature", 0.5, "--seed", 1, "--json")
    trace = embedded((tmp_path / "trace.html").read_text(encoding="utf-8"))
    assert (code, json.loads(out)) == (0, {"page": "trace.html", **summary(trace)})
    assert (trace["mode"], trace["temperature"]) == ("lossless", 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "-o", "/no/such/page.html"], "/no/such/page.html cannot be written: there is no folder /no/such"),
        (["", "-n", "3"], "Invalid value for 'PROMPT': it is empty"),
        (["a", "--temperature", "0.5"], "use mode='lossless' to sample"),
    ],
)
def test_mistakes(arguments, message, command):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert message in err
