"""Calibrating: what the heads are found to be worth, what steps cost, and what is not done a second time."""

import dataclasses

import pytest
import torch

from medusa_engine import Medusa, calibrate, calibration
from medusa_engine.calibration import best_nodes
from medusa_engine.captured import Cuda
from medusa_engine.dataset import shard_paths
from medusa_engine.draft import MedusaDrafter
from medusa_engine.engine import DEFAULT_HEADS
from medusa_engine.heads_files import load_heads, save_heads
from medusa_engine.stepping import tokens_per_step
from medusa_kernels import Tree
from tests.engine.calibrating import PROMPTS, costs, patchy, quick
from tests.engine.models import (
    FOLDER,
    SPOKEN,
    counting_folder,
    counting_heads_folder,
    fitted_heads,
    random_folder,
    random_model,
    shown,
)
from tests.engine.models import PROMPTS as PROMPTS_OF_IDS
from tests.engine.stand_in_gpu import StandIn, native_launches_on_tape

BACKENDS = ["cpu", "reference"]

pytestmark = pytest.mark.usefixtures("cache")


# What steps cost


def test_what_is_best_between_measured_sizes_is_measured_too(monkeypatch, cache):
    """Steps cost the same up to 5 nodes, far more beyond: 4 is on the grid, 5 is not, and the line to 6 hides it."""
    asked = []

    def samples(model, drafter, trees, prompts, rounds):
        asked.append([tree.num_nodes for tree in trees])
        return costs(lambda n: 1.0 + 0.001 * n if n <= 5 else 1.2)(model, drafter, trees, prompts, rounds)

    monkeypatch.setattr(calibrate, "step_samples", samples)
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


def test_on_a_gpu_replayed_steps_are_timed(monkeypatch):
    """As the engine takes them: verb by verb, launches cost more than a GPU's work."""
    with native_launches_on_tape():
        engine = patchy()
        gpu = StandIn()
        monkeypatch.setattr(Cuda, "of", lambda model: gpu)
        drafter = MedusaDrafter(engine.model, engine.heads)
        trees = [Tree.named("root"), Tree.named("chain-3")]
        taken = calibrate.step_samples(engine.model, drafter, trees, [[1, 2, 3]], 2)
    assert {nodes: len(times) for nodes, times in taken.items()} == {1: 2, 4: 2}
    assert gpu.captured == len(trees)


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


# A second time


def test_nothing_finished_is_done_again(monkeypatch, cache):
    """Ctrl-C in the third group of prompts: two groups are kept, and the next call writes the third alone."""
    monkeypatch.setattr(calibrate, "step_samples", costs(lambda n: 1.0))
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


def test_a_batch_size_that_was_timed_before_ctrl_c_is_not_timed_again(monkeypatch, cache):
    timed, curve = [], calibrate._curve

    def timing(*arguments, batch, **options):
        timed.append(batch)
        if timed == [1, 2]:
            raise KeyboardInterrupt
        return curve(*arguments, batch=batch, **options)

    monkeypatch.setattr(calibrate, "step_samples", costs(lambda n: 1.0))
    monkeypatch.setattr(calibrate, "_curve", timing)
    with pytest.raises(KeyboardInterrupt):
        quick(patchy(), batches=(1, 2))
    path, found = quick(patchy(), batches=(1, 2))
    assert timed == [1, 2, 2]
    assert set(found.curves) == {1, 2}
    assert list(cache.iterdir()) == [path]
    quick(patchy(), batches=(1, 2))  # nothing was left undone: measured anew
    assert timed == [1, 2, 2, 1, 2]


def test_another_batch_size_joins_without_new_answers(monkeypatch):
    monkeypatch.setattr(calibrate, "step_samples", costs(lambda n: 1 + n / 100))
    path, first = quick(patchy())
    monkeypatch.setattr(calibrate, "moments", None)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "step_samples", stop)
        with pytest.raises(KeyboardInterrupt):
            quick(patchy(), batches=(2,))
    assert calibration.read(path) == first
    _, both = quick(patchy(), batches=(2,))
    assert set(both.curves) == {1, 2}
    assert both.curves[1] == first.curves[1]
    assert dataclasses.replace(both, curves={}) == dataclasses.replace(first, curves={})


def test_other_text_keeps_the_measured_steps(monkeypatch):
    monkeypatch.setattr(calibrate, "step_samples", costs(lambda n: 1 + n / 100))
    _, first = quick(patchy(), batches=(1, 2))
    _, other = quick(patchy(), PROMPTS[:10], batches=(1,))
    assert other.about["text"] != first.about["text"]
    assert other.curves[2] == first.curves[2]
    assert other.tree(2) is not None


def test_all_but_the_times_is_deterministic(monkeypatch, cache):
    monkeypatch.setattr(calibrate, "step_samples", costs(lambda n: 1 + n / 10))
    path, found = quick(patchy())
    path.unlink()
    assert quick(patchy()) == (path, found)


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
    ids=shown,
)
def test_where_temperatures_cannot_be_stored(folder, message):
    counting_folder()
    with pytest.raises(ValueError, match=message):
        calibrate.check_storable(folder)
