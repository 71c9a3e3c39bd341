"""Sampling: a seed says everything, Medusa or plain, and so does a prompt's seed wherever the prompt stands."""

import itertools
from functools import cache

import pytest
import torch

from medusa_engine import Medusa
from medusa_engine.heads_files import save_heads
from medusa_engine.sampling import SamplingOptions
from medusa_kernels.reference.sampling import draw, kept_weights
from tests.engine.models import (
    FOLDER,
    PROMPTS,
    SPOKEN,
    counting_folder,
    counting_heads_folder,
    fitted_heads,
    random_folder,
    token,
    whole_logits,
)

CPU = torch.device("cpu")


@cache
def heads_folder():
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(random_folder(), dtype=torch.float32)
    folder = FOLDER / "sampling-fitted"
    save_heads(folder, fitted_heads(model, PROMPTS, num_heads=4), dtype=torch.float32)
    return folder


@cache
def engine(backend: str = "cpu", dtype: str = "float32", tree: str = "4x3x2") -> Medusa:
    return Medusa.from_pretrained(random_folder(), heads_folder(), backend=backend, dtype=dtype, tree=tree)


@cache
def counting(peak: float) -> Medusa:
    """One of the 64 tokens is likelier than the others by exp(peak); the heads know which."""
    return Medusa.from_pretrained(counting_folder(peak), counting_heads_folder(), dtype="float32", tree="chain-4")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 20, "top_p": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize(("backend", "dtype"), [("cpu", "float32"), ("cpu", "bfloat16"), ("reference", "float32")])
def test_seeded_lossless_medusa_is_seeded_plain_sampling(backend, dtype, options):
    count = 40 if backend == "cpu" else 16
    texts = set()
    for seed in (1, 2, -(2**63)):
        options = {**options, "mode": "lossless", "seed": seed}
        fast = engine(backend, dtype).generate(PROMPTS, count, **options)
        plain = engine(backend, dtype).generate(PROMPTS, count, medusa=False, **options)
        assert fast.token_ids == plain.token_ids
        assert fast.stats.steps < plain.stats.steps  # some drafts were drawn
        texts.add(tuple(fast.text))
    assert len(texts) == 3


def test_every_token_is_drawn_by_the_counter_of_its_position():
    """The token at position p of prompt and text takes the seed's Philox number p: none is taken twice."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(random_folder(), dtype=torch.float32)
    options = {"temperature": 0.8, "top_p": 0.95, "top_k": 30}
    for seed, prompt in enumerate(PROMPTS, start=5):
        ids = engine().generate(prompt, 24, mode="lossless", seed=seed, **options).token_ids
        logits = whole_logits(model, [*prompt, *ids])
        weights = [kept_weights(row, *options.values()) for row in logits[len(prompt) - 1 : -1]]
        assert ids == [draw(w, seed, position) for position, w in enumerate(weights, start=len(prompt))]


def test_lossless_takes_several_tokens_a_step_and_still_samples():
    out = counting(5.0).generate(["a"] * 8, 60, mode="lossless", seed=list(range(8)), ignore_eos=True)
    plain = counting(5.0).generate(["a"] * 8, 60, mode="lossless", seed=list(range(8)), ignore_eos=True, medusa=False)
    assert out.token_ids == plain.token_ids
    assert len({tuple(ids) for ids in out.token_ids}) == 8
    assert 1.5 < out.stats.tokens_per_step < 4.0


@pytest.mark.parametrize("mode", ["lossless", "typical"])
@pytest.mark.parametrize("medusa", [True, False])
def test_a_seed_and_a_prompt_say_everything(mode, medusa):
    seeds = [11, 12, 13, 14]
    options = {"mode": mode, "temperature": 0.9, "medusa": medusa}
    alone = [engine().generate(p, 24, seed=s, **options) for p, s in zip(PROMPTS, seeds, strict=True)]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 2, 0, 0]):
        out = engine().generate([PROMPTS[i] for i in order], 24, seed=[seeds[i] for i in order], **options)
        assert out.token_ids == [alone[i].token_ids for i in order]
    again = [c.token_ids for c in engine().stream(PROMPTS[0], 24, seed=11, **options)]
    assert list(itertools.chain(*again)) == alone[0].token_ids
    assert engine().generate([PROMPTS[0]] * 2, 24, seed=11, **options).token_ids == [alone[0].token_ids] * 2


@pytest.mark.parametrize("draft", ["prompt-lookup", "first-layers:1"])
def test_typical_does_not_depend_on_how_many_there_are(draft):
    """What it takes depends on the tree, and "auto" is another one for a batch."""
    guessing = engine().with_draft(draft)
    assert guessing.tree(1) != guessing.tree(4)
    options = {"mode": "typical", "temperature": 0.9}
    together = guessing.generate(PROMPTS, 24, seed=[1, 2, 3, 4], **options).token_ids
    assert together == [guessing.generate(p, 24, seed=s, **options).token_ids for s, p in enumerate(PROMPTS, 1)]


def test_without_a_seed_every_run_and_every_sequence_differs():
    out = engine().generate([PROMPTS[0]] * 3, 30, mode="lossless")
    again = engine().generate([PROMPTS[0]] * 3, 30, mode="lossless")
    assert len({tuple(ids) for ids in out.token_ids + again.token_ids}) == 6


def test_the_first_token_is_drawn_as_well():
    """Also from the distribution asked for: 400 draws of a token of probability 1/2 stay within five sigma."""
    peak = torch.tensor(63.0).log().item()  # e^peak against 63 others
    firsts = [i[0] for i in counting(peak).generate(["a"] * 400, 1, mode="lossless", seed=list(range(400))).token_ids]
    hits = firsts.count(token("b"))
    assert 150 < hits < 250
    assert len(set(firsts)) > 40
    only = counting(peak).generate(["a"] * 50, 1, mode="lossless", top_k=1, seed=list(range(50))).token_ids
    assert only == [[token("b")]] * 50


def test_medusa_follows_the_models_distribution():
    """Over 12,800 pairs of neighbours the likely successor comes as often as the model says, within five sigma."""
    peak = 3.0
    out = counting(peak).generate(
        ["a"] * 128, 101, mode="lossless", seed=list(range(128)), ignore_eos=True, temperature=0.8
    )
    pairs = [(x, y) for ids in out.token_ids for x, y in itertools.pairwise(ids)]
    rate = sum(y == (x + 1) % len(SPOKEN) for x, y in pairs) / len(pairs)
    logits = torch.zeros(len(SPOKEN))
    logits[0] = peak
    expected = (logits / 0.8).softmax(0)[0].item()  # other logits are noise of 0.05 about 0
    assert abs(rate - expected) < 5 * (0.25 / len(pairs)) ** 0.5 + 0.005
    assert out.stats.tokens_per_step > 1.1


def test_typical_runs_and_takes_more_than_greedy_would():
    options = {"mode": "typical", "temperature": 0.7, "seed": 3}
    out = engine().generate(PROMPTS, 40, **options)
    assert [len(ids) for ids in out.token_ids] == [40] * len(PROMPTS)
    assert out.token_ids == engine().generate(PROMPTS, 40, **options).token_ids
    loose = engine().generate(PROMPTS, 40, posterior_threshold=0.001, posterior_alpha=0.001, **options)
    strict = engine().generate(PROMPTS, 40, posterior_threshold=1.0, posterior_alpha=10.0, **options)
    assert strict.stats.tokens_per_step < out.stats.tokens_per_step < loose.stats.tokens_per_step
    assert loose.stats.tokens_per_step > 2


@pytest.mark.parametrize("mode", ["lossless", "typical"])
def test_temperature_0_is_greedy(mode):
    greedy = engine().generate(PROMPTS, 24)
    assert engine().generate(PROMPTS, 24, mode=mode, temperature=0.0, seed=1).token_ids == greedy.token_ids
    assert engine().generate(PROMPTS, 24, mode=mode, temperature=0, medusa=False).token_ids == greedy.token_ids


def test_options_per_sequence():
    prompts = [PROMPTS[0]] * 5
    options = {
        "mode": ["greedy", "lossless", "lossless", "typical", "lossless"],
        "temperature": [1.0, 0.5, 0.0, 0.7, 2.0],
        "top_k": [0, 3, 0, 0, 10],
        "top_p": [1.0, 1.0, 0.5, 1.0, 0.8],
        "posterior_threshold": [0.09, 0.09, 0.09, 0.2, 0.09],
        "posterior_alpha": [0.3, 0.3, 0.3, 0.45, 0.3],
        "seed": [1, 2, 3, 4, 5],
    }
    together = engine().generate(prompts, 24, **options).token_ids
    alone = [
        engine().generate(prompts[i], 24, **{name: values[i] for name, values in options.items()}).token_ids
        for i in range(5)
    ]
    assert together == alone
    assert together[0] == together[2] == engine().generate(prompts[0], 24).token_ids
    assert len({tuple(ids) for ids in together}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.7}, r"temperature=0\.7 has no effect with mode='greedy'; use mode='lossless'"),
        ({"top_p": 0.9}, r"top_p=0\.9 has no effect with mode='greedy'; use mode='lossless'"),
        ({"top_k": 40}, r"top_k=40 has no effect with mode='greedy'; use mode='lossless'"),
        ({"mode": ["lossless", "greedy"], "top_k": [4, 4]}, r"top_k=4 has no effect with mode='greedy'"),
        ({"mode": ["greedy", "lossless"], "temperature": 0.5}, r"temperature=0\.5 has no effect"),
        ({"mode": "beam"}, r"mode must be one of 'greedy', 'typical', 'lossless', not 'beam'"),
        ({"mode": ["greedy"]}, r"mode must be one value or one per sequence \(2\), not 1"),
        ({"mode": None}, r"mode must be a str or one per sequence, not NoneType"),
        ({"mode": "lossless", "temperature": -1.0}, r"temperature must be finite, at least 0, not -1\.0"),
        ({"mode": "lossless", "temperature": float("nan")}, r"temperature must be finite"),
        ({"mode": "lossless", "temperature": "hot"}, r"temperature must be a number or one per sequence, not 'hot'"),
        ({"temperature": "hot"}, r"temperature must be a number or one per sequence, not 'hot'"),
        ({"mode": "lossless", "temperature": [1.0]}, r"temperature must be one value or one per sequence \(2\)"),
        ({"temperature": [1.0] * 3}, r"temperature must be one value or one per sequence \(2\)"),
        ({"mode": "lossless", "top_p": 0.0}, r"top_p must be finite, above 0 and at most 1, not 0\.0"),
        ({"mode": "lossless", "top_p": 1.5}, r"top_p must be finite, above 0 and at most 1, not 1\.5"),
        ({"mode": "lossless", "top_k": -1}, r"top_k must be finite, at least 0"),
        ({"mode": "lossless", "top_k": 2.5}, r"top_k must hold integers, not 2\.5"),
        ({"mode": "typical", "posterior_threshold": -0.1}, r"posterior_threshold must be finite, at least 0"),
        ({"mode": "typical", "posterior_alpha": -0.1}, r"posterior_alpha must be finite, at least 0"),
        ({"mode": "lossless", "seed": 1.5}, r"seed must be a 64-bit int, not 1\.5"),
        ({"mode": "lossless", "seed": 2**63}, r"seed must be a 64-bit int, not 9223372036854775808"),
        ({"mode": "lossless", "seed": [1]}, r"seed must be one int or one per prompt \(2\), not 1"),
        ({"mode": "lossless", "seed": True}, r"seed must be a 64-bit int, not True"),
        ({"seed": "x"}, r"seed must be"),
    ],
    ids=str,
)
def test_mistakes(options, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        engine().generate(PROMPTS[:2], 4, **options)
    assert "\n" not in str(caught.value)


def test_all_greedy_needs_no_acceptance():
    assert SamplingOptions().acceptance(3, CPU) is None
    assert SamplingOptions(mode=["greedy"] * 3, temperature=[1.0] * 3, seed=[1, 2, 3]).acceptance(3, CPU) is None
    mixed = SamplingOptions(mode=["greedy", "typical"], temperature=[1.0, 0.7], seed=[5, None]).acceptance(2, CPU)
    assert mixed.mode.tolist() == [0, 1]
    assert mixed.temperature.tolist() == pytest.approx([1.0, 0.7])
    assert mixed.seed[0] == 5
    assert mixed.offset.tolist() == [0, 0]
