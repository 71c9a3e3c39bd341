"""Calibration: what the heads are found to be worth, the tree that follows, the file, and who reads it."""

import dataclasses
import importlib.util
import json
import math
import re
import shutil
from functools import partial

import pytest
import torch

from medusa_engine import Medusa, calibrate, calibration
from medusa_engine.calibration import Calibration, Curve, best_nodes
from medusa_engine.dataset import shard_paths
from medusa_engine.draft import MedusaDrafter
from medusa_engine.engine import DEFAULT_HEADS
from medusa_engine.heads_files import load_heads, save_heads
from medusa_engine.stepping import tokens_per_step
from medusa_kernels import Tree
from tests.engine.models import (
    FOLDER,
    SPOKEN,
    counting_folder,
    counting_heads_folder,
    fitted_heads,
    random_folder,
    random_model,
    write_counting,
)
from tests.engine.models import PROMPTS as PROMPTS_OF_IDS

# Every fourth letter begins a text of its own length; 40 texts are three groups.
PROMPTS = [c * (1 + i % 3) for i, c in enumerate("aeimquybfjnrvzcgkosw")] * 2
BACKENDS = ["cpu", "reference"]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibrations"


def patchy(backend: str = "cpu", **options) -> Medusa:
    """An engine whose heads are right at rank 0 or at rank 1, as counting_heads_folder says."""
    heads = counting_heads_folder(4, patchy=True)
    return Medusa.from_pretrained(counting_folder(), heads, dtype="float32", backend=backend, **options)


def quick(engine: Medusa, prompts=PROMPTS, **options):
    return calibrate.calibrate(engine, prompts, **{"max_new_tokens": 30, "rounds": 1, "context": 20, **options})


def costs(step_seconds):
    """Steps that take exactly so long, instead of being timed: step_seconds(nodes)."""

    def samples(model, drafter, trees, prompts, rounds):
        return {tree.num_nodes: [step_seconds(tree.num_nodes)] * rounds for tree in trees}

    return samples


# The choice


@pytest.mark.parametrize(
    ("step_seconds", "best"),
    [
        (lambda n: 1.0, 64),  # nodes are free
        (lambda n: float(n), 1),  # a node costs a whole step: plain decoding
        (lambda n: 1.0 if n <= 8 else 0.9 * n, 8),  # free up to 8
        (lambda n: 10 + 0.1 * n, max(range(1, 65), key=lambda n: (1 + math.log(n)) / (10 + 0.1 * n))),
    ],
)
def test_the_best_tree_has_the_most_tokens_per_second(step_seconds, best):
    brings = [1 + math.log(n) for n in range(1, 65)]
    curve = Curve(256, 1, 0.0, {n: step_seconds(n) for n in range(1, 65)})
    assert best_nodes(brings, curve) == best


def test_of_equals_the_smallest_and_never_more_than_was_measured():
    assert best_nodes([1.0, 2.0, 3.0, 4.0], Curve(8, 1, 0.0, {1: 1.0, 2: 2.0, 4: 4.0})) == 1
    assert best_nodes([1.0, 2.0, 3.0], Curve(8, 1, 0.0, {1: 1.0, 2: 1.0})) == 2
    assert best_nodes([1.0, 2.0], Curve(8, 1, 0.0, {1: 1.0, 8: 1.0})) == 2


def test_a_curve_needs_the_root_alone():
    for wrong in ({}, {2: 1.0}, {1: 0.0}, {1: 1.0, 2: -1.0}):
        with pytest.raises(ValueError, match="hold node count 1"):
            Curve(8, 1, 0.0, wrong)


def test_what_is_best_between_measured_sizes_is_measured_too(monkeypatch, cache):
    """Steps cost the same up to 5 nodes, far more beyond: 4 is on the grid, 5 is not, and the line to 6 hides it."""
    asked = []

    def samples(model, drafter, trees, prompts, rounds):
        asked.append([tree.num_nodes for tree in trees])
        return costs(lambda n: 1.0 + 0.001 * n if n <= 5 else 1.2)(model, drafter, trees, prompts, rounds)

    monkeypatch.setattr(calibrate, "_step_samples", samples)
    engine = patchy()
    _, found = quick(engine)
    brings = [1.0, 1.5, 1.6, 1.7, 1.99, 2.0, *[2.0] * 30]
    known = dataclasses.replace(found, tokens_per_step=brings, paths=[[r] for r in range(40)])
    drafter = MedusaDrafter(engine.model, engine.heads)
    asked.clear()
    curve = calibrate._curve(engine.model, drafter, known, [[1, 2]], batch=1, context=4, rounds=1)
    assert asked[0] == [n for n in calibrate.NODES if n <= len(brings)]
    assert asked[1:] == [[1, 5]]
    assert best_nodes(brings, curve) == 5
    assert curve.step_seconds[5] == pytest.approx(1.005)


# What the heads are worth


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_heads_accuracy_is_what_the_heads_know(backend):
    _, found = quick(patchy(backend), rounds=1)
    starts = [SPOKEN.index(p[-1]) for p in PROMPTS]
    for head in range(4):
        # The root at answer position j is start + 1 + j; the heads' own `last` is the token before it.
        last = [(s + j) % len(SPOKEN) for s in starts for j in range(30) if j + head + 1 < 30]
        knows = sum(head < token * 7 % 5 for token in last) / len(last)
        assert found.accuracy[head][0] == pytest.approx(knows, abs=1e-4)
        assert found.accuracy[head][1] == pytest.approx(1 - knows, abs=1e-4)
        assert sum(found.accuracy[head][2:]) == 0
    assert found.about["positions"] == 30 * len(PROMPTS)


def test_expected_tokens_per_step_come_true():
    prompts = [p for p in PROMPTS[:20] for _ in range(2)]  # the same text in both halves
    _, found = quick(patchy(), prompts, max_new_tokens=40)
    assert found.tokens_per_step[0] == 1.0
    for nodes in (2, 4, 8):
        tree = Tree.from_choices(found.paths[: nodes - 1])
        real = patchy(tree=tree).generate(prompts, 40).stats.tokens_per_step
        assert found.tokens_per_step[nodes - 1] == pytest.approx(real, rel=0.06)


def test_a_tree_is_not_judged_on_the_text_it_was_made_from():
    """Ranks of pure chance: a tree made from them looks better than it is."""
    generator = torch.Generator().manual_seed(0)
    ranks = [torch.randint(0, 30, (2, 20), generator=generator) for _ in range(4)]
    held_out = calibrate.held_out_tokens_per_step(ranks, 12)
    own = calibrate.best_paths(ranks, 11, absent=calibrate.RANKS)
    assert held_out[11] < tokens_per_step(ranks, own) - 0.1
    # Each half judges the other's trees, weighted by its steps.
    halves = ranks[0::2], ranks[1::2]
    trees = [calibrate.best_paths(half, 11, absent=calibrate.RANKS)[:3] for half in halves]
    steps = sum(40 / tokens_per_step(half, tree) for half, tree in zip(halves, reversed(trees), strict=True))
    assert held_out[3] == pytest.approx(80 / steps)


def test_paths_that_the_heads_list_are_taken_when_they_are_better():
    ranks = [torch.tensor([[1, 1, 1, 1], [2, 2, 2, 2]]), torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0]])]
    good = [[0], [1], [0, 0], [1, 2]]
    paths, speeds = calibrate._growth(ranks, good)
    assert paths == good
    assert speeds == [tokens_per_step(ranks, good[:n]) for n in range(5)]
    paths, speeds = calibrate._growth([*ranks, *ranks], [[5], [6]])
    assert paths == calibrate.best_paths([*ranks, *ranks], calibrate.MAX_PATHS, absent=calibrate.RANKS)
    assert len(speeds) == len(paths) + 1


class Guesser:
    """Heads whose logits are `sharpness` times those that the text was drawn from."""

    def __init__(self, sharpness, vocab: int, token_map):
        self.num_heads, self.vocab_size, self.paths = len(sharpness), vocab, None
        self._sharpness, self._map = torch.tensor(sharpness)[None, :, None], token_map

    def bind(self, hidden, root, top_k):
        shape = (len(hidden), self.num_heads, top_k)
        tokens, logprobs = torch.empty(shape, dtype=torch.int32), torch.empty(shape)

        def call():
            values, ids = (hidden[:, None] * self._sharpness).log_softmax(2).topk(top_k)
            logprobs.copy_(values)
            tokens.copy_(self._map[ids])

        return tokens, logprobs, call


def test_a_temperature_undoes_overconfidence():
    generator = torch.Generator().manual_seed(0)
    sharpness, vocab, positions = [0.5, 1.0, 1.7, 3.0], 24, 1000
    token_map = torch.randperm(100, generator=generator)[:vocab].int()
    logits = 2 * torch.randn(positions, vocab, generator=generator)
    drawn = logits.softmax(1).multinomial(4, replacement=True, generator=generator)
    right = token_map[drawn]
    right[::7] = 101  # outside the draft vocabulary, and past the end: they do not count
    right[::11] = -1
    rows = calibrate.Rows(logits, torch.zeros(positions, dtype=torch.int32), right)
    model = type("Cpu", (), {"activation_dtype": torch.float32, "device": torch.device("cpu")})
    found, loss = calibrate._temperatures(model, Guesser(sharpness, vocab, token_map), rows)
    assert found == pytest.approx(sharpness, rel=0.12)
    counted = right[:, 0] >= 0
    counted &= right[:, 0] < 101
    best = -logits.log_softmax(1)[counted].gather(1, drawn[counted]).mean(0)
    for head, (before, after) in enumerate(loss):
        assert after == pytest.approx(float(best[head]), rel=0.01)
        assert before > after + 0.1 or sharpness[head] == 1.0
    own = -(logits * 3.0).log_softmax(1)[counted].gather(1, drawn[counted]).mean(0)
    assert loss[3][0] == pytest.approx(float(own[3]), abs=1e-3)


def test_a_temperature_without_evidence_is_one():
    rows = calibrate.Rows(torch.zeros(5, 6), torch.zeros(5, dtype=torch.int32), torch.full((5, 1), -1))
    model = type("Cpu", (), {"activation_dtype": torch.float32, "device": torch.device("cpu")})
    assert calibrate._temperatures(model, Guesser([1.0], 6, torch.arange(6)), rows) == ([1.0], [[0.0, 0.0]])


@pytest.mark.parametrize("draft_vocab", [None, 40])
def test_real_heads_and_a_reduced_vocabulary(draft_vocab, monkeypatch, tmp_path):
    """Every number of a random model's calibration against its heads run in plain PyTorch."""
    base, prompts = random_model("llama"), list(PROMPTS_OF_IDS)
    heads = fitted_heads(base, prompts, num_heads=2, draft_vocab=draft_vocab)
    save_heads(tmp_path / "heads", heads, dtype=torch.float32)
    engine = Medusa.from_pretrained(random_folder(), tmp_path / "heads", dtype="float32")
    monkeypatch.setattr(engine.tokenizer, "encode_prompt", lambda prompt: prompt)  # it knows no text
    answers = [engine.generate(prompt, 30, medusa=False).token_ids for prompt in prompts]
    vocab = 96 if draft_vocab is None else draft_vocab
    hits = torch.zeros(2, vocab)
    counts = torch.zeros(2)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            states = base.model(input_ids=torch.tensor([prompt + answer])).last_hidden_state[0]
        for head in range(2):
            for j in range(len(answer) - head - 1):
                x = states[len(prompt) - 1 + j]
                x = x + torch.nn.functional.silu(heads.block_weight[head, 0] @ x + heads.block_bias[head, 0])
                order = (heads.lm_head_weight[head] @ x).argsort(descending=True)
                guesses = order if heads.token_map is None else heads.token_map[order]
                counts[head] += 1
                hits[head, (guesses == answer[j + head + 1]).nonzero()] += 1
    _, found = quick(engine, prompts, max_new_tokens=30)
    # The hidden rows are kept in bfloat16, so a near-tie may turn.
    expected = (hits / counts[:, None])[:, : calibrate.RANKS]
    assert torch.tensor(found.accuracy)[:, : expected.shape[1]] == pytest.approx(expected, abs=0.03)
    assert expected[0, 0] > 0.3


# The file


def test_the_file_holds_what_was_returned(cache):
    path, found = quick(patchy(), batches=(1, 3))
    assert path.parent == cache
    assert sorted(cache.iterdir()) == [path]  # no partial answers are left
    assert calibration.read(path) == found
    assert set(found.curves) == {1, 3}
    assert found.curves[1].context == 20
    sizes = [n for n in calibrate.NODES if n <= len(found.tokens_per_step)]
    assert set(sizes) <= set(found.curves[1].step_seconds)
    assert all(seconds > 0 for seconds in found.curves[1].step_seconds.values())
    assert found.tree(2) is None


def test_all_but_the_times_is_deterministic(monkeypatch, cache):
    monkeypatch.setattr(calibrate, "_step_samples", costs(lambda n: 1 + n / 10))
    path, found = quick(patchy())
    path.unlink()
    assert quick(patchy()) == (path, found)


def test_every_machine_model_heads_and_dtype_has_its_own(monkeypatch, tmp_path):
    def path(model, heads, dtype="float32", backend="cpu"):
        engine = Medusa.from_pretrained(model, heads, dtype=dtype, backend=backend)
        return calibration.locate(engine.model, MedusaDrafter(engine.model, engine.heads))

    other_model = write_counting(tmp_path / "other", max_position_embeddings=64)
    paths = [
        path(counting_folder(), counting_heads_folder(4)),
        path(counting_folder(), counting_heads_folder(4, patchy=True)),
        path(counting_folder(), counting_heads_folder(2)),
        path(counting_folder(), counting_heads_folder(4), "bfloat16"),
        path(counting_folder(), counting_heads_folder(4), backend="reference"),
        path(other_model, counting_heads_folder(4)),
    ]
    monkeypatch.setattr(calibration.machine, "describe", lambda device: "Other CPU @ 3 GHz, 7 threads")
    paths.append(path(counting_folder(), counting_heads_folder(4)))
    assert len(set(paths)) == len(paths)
    assert paths[-1].name.startswith("other-cpu-3-ghz-7-threads-float32-")
    monkeypatch.undo()
    assert path(counting_folder(), counting_heads_folder(4)).name == paths[0].name


DAMAGE = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "another thing": lambda text: "[]",
    "another version": lambda text: text.replace('"version": 1', '"version": 2'),
    "a field less": lambda text: text.replace('"paths"', '"path"'),
    "no tree": lambda text: json.dumps({**json.loads(text), "paths": [[0, 0]] * 20}),
    "no root": lambda text: text.replace('"step_seconds": {"1": ', '"step_seconds": {"0": '),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_said_passed_over_and_replaced(damage, monkeypatch, cache):
    monkeypatch.setattr(calibrate, "_step_samples", costs(lambda n: 1.0))
    engine = patchy()
    default = engine.tree(1)
    path, found = quick(engine)
    assert engine.tree(1) == found.tree(1) != default
    damaged = damage(path.read_text(encoding="utf-8"))
    assert damaged != path.read_text(encoding="utf-8")
    path.write_text(damaged, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{path.name} is no calibration") as caught:
        calibration.read(path)
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match="is no calibration.*`medusa calibrate` writes it anew"):
        assert engine.tree(1) == default
    with pytest.warns(UserWarning, match="is no calibration"):
        assert patchy().generate("a", 20).token_ids == list(range(2, 22))
    assert quick(engine)[1] == found == calibration.read(path)


# Who reads it


@pytest.mark.parametrize(("step_seconds", "wanted"), [(lambda n: 1.0, None), (lambda n: float(n), 1)])
def test_auto_is_the_calibrated_tree(step_seconds, wanted, monkeypatch):
    monkeypatch.setattr(calibrate, "_step_samples", costs(step_seconds))
    engine, default = patchy(), patchy().tree(2)
    other = Medusa.from_pretrained(counting_folder(), counting_heads_folder(4), dtype="float32")
    untouched = other.tree(1)
    _, found = quick(engine, batches=(1, 3))
    for e in (engine, patchy()):
        assert e.tree(1) == e.tree(3) == found.tree(1)
        assert e.tree(1).num_nodes == (wanted or best_nodes(found.tokens_per_step, found.curves[1]))
        assert e.tree(2) == default  # not measured
        assert e.tree(1, medusa=False).num_nodes == 1
        out = e.generate("a", 40)
        assert out.token_ids == list(range(2, 42))
        assert out.stats.tokens_per_step == 1.0 if wanted == 1 else out.stats.tokens_per_step > 2
    assert patchy(tree="chain-2").tree(1) == Tree.named("chain-2")
    assert other.tree(1) == untouched  # other heads


# Interruptions


def test_nothing_finished_is_done_again(monkeypatch, cache):
    """Ctrl-C in the third group of prompts: two groups are kept, and the next call writes the third alone."""
    monkeypatch.setattr(calibrate, "_step_samples", costs(lambda n: 1.0))
    _, whole = quick(patchy())
    for file in cache.iterdir():
        file.unlink()
    moments, groups = calibrate.moments, []

    def interrupted(engine, prompts, *arguments, **options):
        groups.append(len(prompts))
        if len(groups) == 3:
            raise KeyboardInterrupt
        return moments(engine, prompts, *arguments, **options)

    monkeypatch.setattr(calibrate, "moments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick(patchy())
    (partial,) = cache.iterdir()
    assert len(shard_paths(partial)) == 2
    assert quick(patchy())[1] == whole
    assert groups == [16, 16, 8, 8]


def test_another_batch_size_joins_without_new_answers(monkeypatch):
    monkeypatch.setattr(calibrate, "_step_samples", costs(lambda n: 1 + n / 100))
    path, first = quick(patchy())
    monkeypatch.setattr(calibrate, "moments", None)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "_step_samples", stop)
        with pytest.raises(KeyboardInterrupt):
            quick(patchy(), batches=(2,))
    assert calibration.read(path) == first
    _, both = quick(patchy(), batches=(2,))
    assert set(both.curves) == {1, 2}
    assert both.curves[1] == first.curves[1]
    assert dataclasses.replace(both, curves={}) == dataclasses.replace(first, curves={})


def test_other_text_keeps_the_measured_steps(monkeypatch):
    monkeypatch.setattr(calibrate, "_step_samples", costs(lambda n: 1 + n / 100))
    _, first = quick(patchy(), batches=(1, 2))
    _, other = quick(patchy(), PROMPTS[:10], batches=(1,))
    assert other.about["text"] != first.about["text"]
    assert other.curves[2] == first.curves[2]
    assert other.tree(2) is not None


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ["a"]}, "at least 2 prompts.* not 1"),
        ({"context": 128}, "context must be between 1 and 127, not 128"),
        ({"context": 0}, "context must be between 1 and 127, not 0"),
        ({"rounds": 0}, "must be at least 1"),
        ({"batches": (1, 0)}, "must be at least 1"),
        ({"max_new_tokens": 0}, "must be at least 1"),
        ({"max_new_tokens": 127}, "exceeds max_seqlen 128"),
    ],
    ids=str,
)
def test_mistakes(options, message, cache):
    with pytest.raises(ValueError, match=message):
        quick(patchy(), **{"prompts": PROMPTS, **options})
    assert not list(cache.glob("*.json"))


def test_a_model_without_heads():
    engine = Medusa.from_pretrained(counting_folder(), dtype="float32")
    with pytest.raises(ValueError, match="no Medusa heads to calibrate"):
        quick(engine)


def test_temperatures_are_stored_with_ones_own_heads(tmp_path):
    before = load_heads(counting_heads_folder(4))
    save_heads(tmp_path, before, {"accuracy": [[0.5]]}, dtype=torch.float32)
    weights = (tmp_path / "medusa_lm_head.safetensors").read_bytes()
    calibrate.store_temperatures(calibrate.check_storable(str(tmp_path)), [1.5, 1.25, 1.0, 2.0])
    assert (tmp_path / "medusa_lm_head.safetensors").read_bytes() == weights
    assert load_heads(tmp_path).metadata == {"accuracy": [[0.5]], "temperatures": [1.5, 1.25, 1.0, 2.0]}


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("default", "a folder of your own, not with 'default'"),
        (str(counting_heads_folder(4) / "medusa_lm_head.safetensors"), "a folder of your own"),
        (str(DEFAULT_HEADS), "the shipped heads: copy their folder"),
        (str(FOLDER / "counting-20.0"), "holds a whole model"),
    ],
)
def test_where_temperatures_cannot_be_stored(folder, message):
    counting_folder()
    with pytest.raises(ValueError, match=message):
        calibrate.check_storable(folder)


def test_the_dataclass_reads_its_own_json(tmp_path):
    made = Calibration(
        about={"text": "x"},
        accuracy=[[0.5, 0.25]],
        temperatures=[1.5],
        log_loss=[[2.0, 1.5]],
        paths=[[0], [1], [0, 0]],
        tokens_per_step=[1.0, 1.5, 1.75, 1.8],
        curves={4: Curve(64, 3, 0.1, {1: 0.1, 3: 0.11, 4: 0.5})},
    )
    calibration.write(tmp_path / "a" / "b.json", made)
    assert calibration.read(tmp_path / "a" / "b.json") == made
    assert made.tree(4) == Tree.from_choices([[0], [1]])
    assert made.speedup(4, 3) == pytest.approx(1.75 / 1.1)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.json"]


# The command


@pytest.fixture
def command(medusa, tmp_path):
    """command(*arguments) -> what `medusa calibrate` over PROMPTS ends with and says."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    common = ["--prompts", tmp_path / "prompts.txt", "-n", 20, "--rounds", 2, "--context", 16, "--dtype", "float32"]
    return partial(medusa, "calibrate", *common, "--model", counting_folder())


HEADS = ["--heads", counting_heads_folder(4, patchy=True)]


def test_the_command_prints_the_curve_and_the_choice(command, monkeypatch, cache):
    monkeypatch.setattr(calibrate, "_step_samples", costs(lambda n: 0.01 * (1 + n / 20)))
    code, out, _ = command(*HEADS, "--batch", 1, "--batch", 2)
    (path,) = cache.glob("*.json")
    found = calibration.read(path)
    assert code == 0
    assert f"heads judged on 40 answers, {found.about['positions']} tokens" in out
    assert [line.split()[0] for line in out.splitlines() if re.match(r" +[1-4] +0\.\d{3} +1\.000 ", line)] == [*"1234"]
    for batch in (1, 2):
        chosen = found.nodes(batch)
        speedup = found.tokens_per_step[chosen - 1] * 1.05 / (1 + chosen / 20)
        assert chosen > 1
        assert found.speedup(batch, chosen) == pytest.approx(speedup)
        assert f"\nbatch {batch}, context 16, medians of 2\n" in out
        row = rf" +{chosen} +{10 + chosen / 2:.2f} +\d\.\d\d +{found.tokens_per_step[chosen - 1]:.3f} +"
        rate = batch * found.tokens_per_step[chosen - 1] / (0.01 * (1 + chosen / 20))
        assert re.search(rf"\n{row}{rate:.1f} +{speedup:.2f}x  <- chosen\n", out)
        assert f"tree: {chosen} nodes {found.tree(batch).choices}; expected speedup {speedup:.2f}x" in out
    assert out.count("<- chosen") == 2
    assert out.endswith(f"written to {path} and {path.with_suffix('.png')}\n")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "machine was busy" not in out


def test_a_busy_machine_is_said(command, monkeypatch):
    monkeypatch.setattr(
        calibrate, "_step_samples", lambda m, d, trees, p, r: {tree.num_nodes: [1.0, 2.0, 3.0] for tree in trees}
    )
    assert "the times vary by 100%: the machine was busy" in command(*HEADS)[1]


def test_the_command_as_json(command, cache, tmp_path):
    code, out, _ = command(*HEADS, "--json", "--plot", tmp_path / "curves.png", "--limit", 12)
    (path,) = cache.glob("*")
    found = calibration.read(path)
    result = json.loads(out)
    assert code == 0
    assert (result["calibration"], result["plot"]) == (str(path), str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (result["conversations"], result["temperatures"]) == (12, found.temperatures)
    one = result["batches"]["1"]
    assert one["tree"] == found.tree(1).choices
    assert [p["nodes"] for p in one["points"] if p["chosen"]] == [one["tree_nodes"]]
    assert {p["nodes"]: p["step_seconds"] for p in one["points"]} == found.curves[1].step_seconds
    assert one["points"][0]["cost"] == one["points"][0]["speedup"] == 1.0


def test_store_writes_the_temperatures(command, tmp_path):
    shutil.copytree(counting_heads_folder(4, patchy=True), tmp_path / "mine")
    code, out, _ = command("--heads", tmp_path / "mine", "--store", "--json")
    assert code == 0
    assert load_heads(tmp_path / "mine").metadata["temperatures"] == json.loads(out)["temperatures"]


def test_without_matplotlib(command, monkeypatch, cache, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, _ = command(*HEADS, "--json")
    assert (code, json.loads(out)["plot"]) == (0, None)
    assert not list(cache.glob("*.png"))
    monkeypatch.setattr(Medusa, "from_pretrained", None)  # said before any work
    code, _, err = command(*HEADS, "--plot", tmp_path / "x.png")
    assert (code, err) == (2, "medusa: the curves as PNG need `pip install 'medusa-kernels[bench]'`\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no Medusa heads to calibrate"),
        ([*HEADS, "--limit", 1], "at least 2 prompts"),
        ([*HEADS, "--context", 4096], "context must be between 1 and 127, not 4096"),
        (["--store"], "holds a whole model, not heads alone"),
        ([*HEADS, "--batch", 0], "0 is not in the range"),
    ],
    ids=lambda case: " ".join(map(str, case)) if isinstance(case, list) else None,
)
def test_a_mistake_is_one_line(arguments, message, command):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
