"""bench.peers: parsing, turns, skipping, ratios, the table and the chart, with engines made up for the purpose."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch

from bench import peer_engines, peers
from bench.peer_engines import CONTESTANTS, Contestant, Missing, Spec, serve
from bench.peers import PeerError, Result, Worker, best_peer, compete, headlines, rows, table
from medusa_engine.benchmark import installed_version

OURS16, OURS8 = (next(c for c in CONTESTANTS if c.name == f"ours plain {p}") for p in ("bfloat16", "int8"))
LLAMA16, LLAMA8 = (next(c for c in CONTESTANTS if c.name == f"llama.cpp greedy {p}") for p in ("BF16", "Q8_0"))
FAKE = """
import json, sys
print(json.dumps({"ready": {"version": "1"}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["ids"] == [13]:
        sys.exit(3)
    if request["ids"] == [14]:
        print(json.dumps({"failed": "RuntimeError: no"}), flush=True)
    else:
        short = request["ids"] == [15]
        print(json.dumps({"tokens": [7] * (request["max_new_tokens"] - short), "decode_seconds": 1.0}), flush=True)
"""


def result(contestant: Contestant, *seconds: float, tokens=(1, 2, 3, 4, 5), **extra) -> Result:
    replies = [{"tokens": list(tokens), "decode_seconds": s, **extra} for s in seconds]
    return Result(contestant, {"version": "1.0"}, replies)


@pytest.fixture
def worker():
    made = Worker([sys.executable, "-c", FAKE], {})
    yield made
    made.close()


class Fake:
    """A worker without a process, that notes its turn."""

    def __init__(self, name: str, turns: list[str], trouble: str = ""):
        self.name, self.turns, self.trouble = name, turns, trouble

    def ready(self):
        if self.trouble == "missing":
            raise PeerError("is not installed; run `pip install it`")
        return {"version": "2"}

    def decode(self, ids, max_new_tokens):
        self.turns.append(f"{self.name}{ids[0]}x{max_new_tokens}")
        if self.trouble == "second" and ids[0] == 2:
            raise PeerError("its process ended with exit code -9")
        return {"tokens": [1] * max_new_tokens, "decode_seconds": {"a": 1.0}.get(self.name, 2.0)}

    def close(self):
        self.turns.append(f"close {self.name}")


def test_prompts_go_round_and_troubled_engines_drop_out(capsys):
    turns: list[str] = []
    fakes = {
        OURS16: Fake("a", turns),
        OURS8: Fake("b", turns, "missing"),
        LLAMA16: Fake("c", turns, "second"),
        LLAMA8: Fake("d", turns),
    }
    found = compete(fakes.__getitem__, list(fakes), [[1], [2], [3]], 16)
    warm = peers.WARM_UP_TOKENS
    assert turns[:3] == [f"a1x{warm}", f"c1x{warm}", f"d1x{warm}"]
    assert turns[3:11] == ["a1x16", "c1x16", "d1x16", "a2x16", "c2x16", "d2x16", "a3x16", "d3x16"]
    assert sorted(turns[11:]) == ["close a", "close b", "close c", "close d"]
    assert [r.contestant for r in found] == [OURS16, LLAMA8]
    assert [len(r.replies) for r in found] == [3, 3]
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert said == [
        "ours plain int8: skipped: is not installed; run `pip install it`",
        "llama.cpp greedy BF16: skipped: its process ended with exit code -9",
    ]


def test_a_worker_answers(worker):
    assert worker.ready() == {"version": "1"}
    assert worker.decode([1, 2], 5) == {"tokens": [7] * 5, "decode_seconds": 1.0}


@pytest.mark.parametrize(
    ("ids", "reason"),
    [([13], "its process ended with exit code 3"), ([14], "RuntimeError: no"), ([15], "gave 4 tokens, not 5")],
)
def test_a_worker_in_trouble(worker, ids, reason):
    worker.ready()
    with pytest.raises(PeerError, match=reason):
        worker.decode(ids, 5)


def answers(monkeypatch, engine, *requests) -> list[dict]:
    monkeypatch.setitem(peer_engines.ENGINES, "ours", engine)
    out = io.StringIO()
    serve(Spec(OURS16, 2, 256), iter(json.dumps(r) for r in requests), out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_serving(monkeypatch):
    def run(ids, max_new_tokens):
        if ids == [0]:
            raise RuntimeError("two\nlines")
        return {"tokens": ids * max_new_tokens, "decode_seconds": 0.5}

    made = answers(
        monkeypatch,
        lambda spec: (run, {"version": str(spec.threads)}),
        {"ids": [0], "max_new_tokens": 1},
        {"ids": [4], "max_new_tokens": 2},
    )
    assert made == [
        {"ready": {"version": "2"}},
        {"failed": "RuntimeError: two lines"},
        {"tokens": [4, 4], "decode_seconds": 0.5},
    ]


@pytest.mark.parametrize("error", [Missing("it is not installed"), OSError("no such file")])
def test_what_cannot_be_loaded_is_missing(monkeypatch, error):
    def engine(spec):
        raise error

    reason = "it is not installed" if isinstance(error, Missing) else "cannot load: OSError: no such file"
    assert answers(monkeypatch, engine) == [{"missing": reason}]


@pytest.mark.parametrize(
    ("engine", "module", "package"),
    [
        ("llama.cpp", "llama_cpp", "llama-cpp-python"),
        ("openvino", "openvino_genai", "openvino-genai"),
        ("transformers", "transformers", "transformers"),
    ],
)
def test_a_package_that_is_absent(monkeypatch, engine, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    contestant = next(c for c in CONTESTANTS if c.engine == engine)
    with pytest.raises(Missing, match=f"is not installed; run `pip install {package}`"):
        peer_engines.ENGINES[engine](Spec(contestant, 1, 256))


def test_our_engine_takes_part(monkeypatch):
    """The real worker function, over a tiny model."""
    from medusa_engine import Medusa
    from tests.engine.models import counting_folder, counting_heads_folder

    real = Medusa.from_pretrained
    monkeypatch.setattr(
        Medusa, "from_pretrained", lambda **options: real(counting_folder(), counting_heads_folder(), **options)
    )
    before = torch.get_num_threads()
    try:
        texts = []
        for mode in ("plain", "medusa"):
            run, about = peer_engines.ours(Spec(Contestant("ours", mode, "float32", 32), 1, 256, "chain-3"))
            reply = run([1, 2, 3], 21)
            texts.append(reply["tokens"])
            assert reply["decode_seconds"] > 0
            assert reply["steps"] == (20 if mode == "plain" else 5)
            assert about.get("tree_nodes") == (None if mode == "plain" else 4)
        assert texts[0] == texts[1]
        assert len(texts[0]) == 21
    finally:
        torch.set_num_threads(before)


def test_spec_goes_through_json():
    spec = Spec(LLAMA8, 3, 512, 16)
    assert Spec.loads(spec.dumps()) == spec
    assert spec.environment()["MEDUSA_NUM_THREADS"] == spec.environment()["OMP_NUM_THREADS"] == "3"


def test_results():
    fast, slow = result(OURS8, 1.0, 2.0, 4.0, steps=2), result(LLAMA8, 2.0, 8.0, 4.0, tokens=(1, 2, 9, 4, 5))
    assert fast.speeds == [4.0, 2.0, 1.0]  # four of five tokens: the prefill brought the first
    assert fast.median == 2.0
    assert fast.over(slow) == 2.0  # the median of 2, 4 and 1, not the ratio of the medians
    assert fast.tokens_per_step() == 2.0
    assert slow.tokens_per_step() is None
    assert slow.agreement(fast) == 0.4


def test_best_peer_is_never_ours():
    found = [result(OURS8, 1.0), result(LLAMA16, 2.0), result(LLAMA8, 3.0)]
    assert best_peer(found).contestant == LLAMA16
    assert best_peer(found, 8).contestant == LLAMA8
    assert best_peer(found, 4) is None
    assert best_peer(found[:1]) is None


def test_rows_table_and_headlines():
    found = [result(OURS8, 1.0, 1.0), result(OURS16, 2.0, 2.0), result(LLAMA16, 4.0, 4.0)]
    made = rows(found, prompt_set="chat", max_new_tokens=5, threads=2)
    assert [row["tokens_per_second"] for row in made] == [4.0, 2.0, 1.0]
    assert [row["best_peer_of_same_bits"] for row in made] == [None, LLAMA16.name, LLAMA16.name]
    assert [row["times_best_peer_of_same_bits"] for row in made] == [None, 2.0, 1.0]
    assert {row["benchmark"] for row in made} == {"peers"}
    assert {row["threads"] for row in made} == {2}
    assert {"device", "torch", "commit", "date", "engine_version"} <= made[0].keys()
    json.dumps(made)
    lines = table(made).splitlines()
    assert lines[0].split()[:3] == ["engine", "mode", "weights"]
    assert lines[1].split() == ["ours", "plain", "int8", "4.0", "4.0-4.0", "100%"]
    assert lines[3].split() == ["llama.cpp", "greedy", "BF16", "1.0", "1.0-1.0", "1.00", "100%"]
    assert headlines(found) == [
        "ours plain int8: 4.00x the best peer, llama.cpp greedy BF16",
        "ours plain bfloat16: 2.00x the best 16-bit peer, llama.cpp greedy BF16",
        "ours plain bfloat16: 2.00x the best peer, llama.cpp greedy BF16",
    ]
    assert headlines(found[:2]) == []


def test_chart(tmp_path):
    from PIL import Image

    found = [result(OURS8, 1.0, 1.5), result(OURS16, 2.0, 2.0), result(LLAMA16, 4.0, 4.0)]
    made = rows(found, prompt_set="chat", max_new_tokens=5, threads=2)
    peers.chart(made, tmp_path / "deep" / "chart.png")
    with Image.open(tmp_path / "deep" / "chart.png") as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_arguments():
    args = peers.arguments(["--peers", "ours, llama.cpp", "--precisions", "int8,Q8_0", "--limit", "3"])
    assert [c.name for c in args.contestants] == ["ours plain int8", "ours medusa int8", "llama.cpp greedy Q8_0"]
    assert len(args.texts) == 3
    assert peers.arguments([]).contestants == list(CONTESTANTS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--peers", "vllm"], "no peer 'vllm'; there are ours, transformers, llama.cpp, openvino"),
        (["--peers", ","], "names no peer"),
        (["--precisions", "Q2_K"], "no precision 'Q2_K'"),
        (["--peers", "openvino", "--precisions", "int8"], "no engine among --peers has one of those --precisions"),
        (["--limit", "0"], "must be a whole number of at least 1, not '0'"),
        (["--max-new-tokens", "1"], "--max-new-tokens must be at least 2"),
        (["--prompts", "nowhere"], "there is no file 'nowhere'"),
    ],
)
def test_bad_arguments(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        peers.arguments(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_versions_of_what_is_not_installed_are_none():
    assert installed_version("no-such-package-at-all") is None
    assert installed_version("torch")
