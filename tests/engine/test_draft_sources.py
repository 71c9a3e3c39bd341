"""Sources of guesses: whatever they guess, the text is plain decoding's, wherever it ends; trees, mistakes, options."""

import json
import shutil
import weakref
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.losslessness import LENGTH, chi_square, count, outcomes
from medusa_engine import Medusa
from medusa_engine.decode import Decoder
from medusa_kernels import Tree
from tests.engine.draft_targets import RAGGED, noisy_folder, target
from tests.engine.models import (
    FOLDER,
    PROMPTS,
    SPOKEN,
    continuation,
    counting_folder,
    counting_heads_folder,
    random_folder,
    shown,
    spoken,
    token,
    write_tokenizer,
)


def sources() -> dict[str, object]:
    return {
        "prompt-lookup": "prompt-lookup",
        "first-layers:1": "first-layers:1",
        "all-layers": "first-layers:2",
        "noisy": noisy_folder(),
        "padded": noisy_folder(4),
        "itself": str(random_folder()),
    }


@pytest.fixture(params=sources(), scope="module")
def source(request):
    return sources()[request.param]


# The text is plain decoding's


@pytest.mark.parametrize("tree", [2, "chain-4", 9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_source_gives_the_plain_text(source, tree, dtype):
    plain = target(dtype)
    engine = plain.with_draft(source, tree=tree)
    assert engine.tree(1).choices == [[0] * d for d in range(1, engine.tree(1).num_nodes)]
    expected = plain.generate(RAGGED, 30, medusa=False)
    out = engine.generate(RAGGED, 30)
    assert (out.token_ids, out.text, out.finish_reason) == (expected.token_ids, expected.text, expected.finish_reason)
    alone = [engine.generate(prompt, 30) for prompt in RAGGED]
    assert [o.token_ids for o in alone] == expected.token_ids
    assert [s.steps for s in out.stats.per_sequence] == [o.stats.steps for o in alone]


def test_the_reference_backend():
    plain = target(backend="reference")
    expected = plain.generate(PROMPTS[:3], 16, medusa=False).token_ids
    for draft in ("prompt-lookup", "first-layers:1", noisy_folder()):
        assert plain.with_draft(draft, tree=4).generate(PROMPTS[:3], 16).token_ids == expected


def test_int8_and_a_stream():
    plain = Medusa.from_pretrained(random_folder(), draft="first-layers:1", dtype="int8", tree="chain-3")
    expected = plain.generate(PROMPTS[0], 20, medusa=False)
    assert plain.heads is None
    assert plain.generate(PROMPTS[0], 20).token_ids == expected.token_ids
    assert "".join(c.text for c in plain.stream(PROMPTS[0], 20)) == expected.text


SAMPLED = {
    "hot": {"mode": "lossless", "temperature": 2.0},
    "cut": {"mode": "lossless", "temperature": 0.7, "top_p": 0.8, "top_k": 12},
    "cold": {"mode": "lossless", "temperature": 0.0},
    "mixed": {
        "mode": ["greedy", "lossless", "lossless", "greedy", "lossless", "lossless", "lossless", "lossless"],
        "temperature": [1.0, 0.3, 0.6, 1.0, 0.9, 1.2, 3.0, 0.0],
    },
}


@pytest.mark.parametrize("options", SAMPLED.values(), ids=SAMPLED)
def test_seeded_lossless_is_seeded_plain_sampling(source, options):
    seeds = list(range(100, 100 + len(RAGGED)))
    expected = target().generate(RAGGED, 24, medusa=False, seed=seeds, **options)
    out = target().with_draft(source, tree=4).generate(RAGGED, 24, seed=seeds, **options)
    assert out.token_ids == expected.token_ids
    if options is SAMPLED["hot"]:
        other = target().generate(RAGGED, 24, medusa=False, seed=7, **options)
        assert all(a != b for a, b in zip(other.token_ids, expected.token_ids, strict=True))


def test_sampled_text_has_the_models_own_distribution():
    """Whole outputs against their exact probabilities; a biased acceptance fails the same test."""
    base = Medusa.from_pretrained(counting_folder(3.0), dtype="float32")
    exact = outcomes(base, [token("a")], {"temperature": 1.0, "top_p": 1.0, "top_k": 0})

    def p_value(engine: Medusa, **options) -> float:
        texts = []
        for seed in range(0, 1024, 256):
            seeds = range(seed, seed + 256)
            texts += engine.generate([[token("a")]] * 256, LENGTH, ignore_eos=True, seed=seeds, **options).token_ids
        return chi_square((count(texts, exact), 1024 * torch.tensor(list(exact.values()))))["p_value"]

    for draft in ("first-layers:1", wrong_at(lambda last: last % 2, peak=3.0), "prompt-lookup"):
        assert p_value(base.with_draft(draft, tree="chain-2"), mode="lossless") > 1e-4
    biased = {"mode": "typical", "posterior_threshold": 0.01}
    assert p_value(base.with_draft("first-layers:1", tree="chain-2"), **biased) < 1e-12


# Ends


@cache
def wrong_at(wrong, peak: float = 20.0):
    """A counting model that errs after the tokens that `wrong` names."""
    folder = FOLDER / f"counting-wrong-{len(list(FOLDER.iterdir()))}"
    shutil.copytree(counting_folder(peak), folder)
    tensors = load_file(folder / "model.safetensors")
    for last in range(len(SPOKEN)):
        if wrong(last):
            tensors["lm_head.weight"][:, last] = tensors["lm_head.weight"][:, last].roll(7)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_eos_stop_strings_and_limits_in_a_batch():
    """Sequences end at different steps, some in the middle of a step; what follows in the step is not said."""
    plain = Medusa.from_pretrained(counting_folder(), dtype="float32")
    prompts = ["V", "a", "P", "G", "w", "U"]
    options = {"max_new_tokens": 30, "stop": ["stop", "IJ"]}
    expected = plain.generate(prompts, medusa=False, **options)
    assert set(expected.finish_reason) == {"eos", "stop", "length"}
    steps = set()
    for draft in ("first-layers:1", wrong_at(lambda last: last % 5 == 3), "prompt-lookup"):
        for tree in ("chain-1", "chain-7"):
            out = plain.with_draft(draft, tree=tree).generate(prompts, **options)
            for name in ("token_ids", "text", "finish_reason"):
                assert getattr(out, name) == getattr(expected, name)
            steps |= {round(s.tokens_per_step, 1) for s in out.stats.per_sequence}
    assert len(steps) > 4  # acceptances of many lengths


def test_the_last_row_is_reached_and_never_passed():
    plain = Medusa.from_pretrained(random_folder(), dtype="float32", max_seqlen=40)
    prompts = [list(range(10)), [5]]
    expected = plain.generate(prompts, 30, medusa=False).token_ids
    for draft in ("prompt-lookup", "first-layers:1", "first-layers:2", noisy_folder(), str(random_folder())):
        assert plain.with_draft(draft, tree="chain-9").generate(prompts, 30).token_ids == expected


def test_decoders_are_reused():
    engine = target().with_draft(noisy_folder(), tree=4)
    calls = [(RAGGED[:2], 8), (RAGGED[:1], 8), (RAGGED[4:5], 50), (RAGGED[:1], 8), (RAGGED[:2], 8)]
    for prompts, tokens in calls:
        assert engine.generate(prompts, tokens).token_ids == target().generate(prompts, tokens, medusa=False).token_ids


def test_a_decoder_goes_with_its_last_user():
    """A draft that kept its decoder would keep the cache too, until the garbage collector came by."""
    for draft in ("prompt-lookup", "first-layers:1", noisy_folder()):
        engine = target().with_draft(draft)
        decoder = Decoder(engine.model, engine.drafter, Tree.named("chain-2"), batch=1, max_seqlen=64)
        decoder.start([PROMPTS[0]], None)
        decoder.step()
        gone = weakref.ref(decoder)
        del decoder
        assert gone() is None


# Trees and mistakes


def test_trees_of_sources_with_one_guess_a_depth():
    for draft, most in (("prompt-lookup", 6), ("first-layers:1", 5), (noisy_folder(), 5)):
        engine = target().with_draft(draft)
        assert [engine.tree(b).num_nodes for b in (1, 2, 3, 6, 50)] == [most, 3, 2, 1, 1]
        for asked, nodes in (
            (8, 8),
            (1, 1),
            ("chain-30", 31),
            ("4x3x2", 4),
            ([[0], [1], [0, 0], [0, 1]], 3),
            (256, 256),
        ):
            tree = target().with_draft(draft, tree=asked).tree(1)
            assert tree == Tree.from_choices([[0] * d for d in range(1, nodes)])


def test_with_draft_shares_the_weights():
    engine = target()
    chain = engine.with_draft("medusa", tree="chain-2")
    assert chain.model is engine.model
    assert chain.heads is engine.heads
    assert chain.tree(1).num_nodes == 3
    assert engine.tree(1).num_nodes != 3
    lookup = engine.with_draft("prompt-lookup").with_draft("medusa", tree="chain-2")
    assert lookup.generate(PROMPTS[0], 10).token_ids == chain.generate(PROMPTS[0], 10).token_ids


def other_tokens():
    folder = FOLDER / "other-tokens"
    shutil.copytree(random_folder(), folder, dirs_exist_ok=True)
    write_tokenizer(folder, [chr(0x4E00 + i) for i in range(95)] + ["ß"])
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "first-layers:0"}, r"draft 'first-layers:0' asks for 0 layers; the model has 1 to 2"),
        ({"draft": "first-layers:3"}, r"asks for 3 layers; the model has 1 to 2"),
        ({"draft": "first-layers:-1"}, r"draft must be 'medusa', .* not 'first-layers:-1'"),
        ({"draft": "first-layers"}, r"draft must be"),
        ({"draft": "/no/such"}, r"draft must be .*a folder, a \.gguf file or a hub id\), not '/no/such'"),
        ({"draft": ""}, r"draft must be"),
        ({"draft": None}, r"draft must be .*, not None"),
        ({"draft": 3}, r"draft must be .*, not 3"),
        ({"draft": counting_folder()}, r"another vocabulary than the model: 64 tokens against 96, different at id 0"),
        ({"draft": counting_heads_folder()}, r"no config\.json|only Medusa heads"),
        ({"draft": "prompt-lookup", "heads": "x"}, r"heads are for draft='medusa'; with draft='prompt-lookup'"),
        ({"draft": "prompt-lookup", "tree": 0}, r"between 1 and 256, not 0"),
        ({"draft": "prompt-lookup", "tree": "oak"}, r"no known tree"),
    ],
    ids=lambda case: shown(case)[:50],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        Medusa.from_pretrained(random_folder(), dtype="float32", **options)
    assert "\n" not in str(caught.value)


def test_a_draft_of_other_tokens():
    with pytest.raises(ValueError, match=r"96 tokens against 96, different at id 95 \("):
        Medusa.from_pretrained(random_folder(), draft=other_tokens(), dtype="float32")
    with pytest.raises(ValueError, match="draft 'medusa' needs Medusa heads, and this engine was loaded without"):
        Medusa.from_pretrained(random_folder(), dtype="float32").with_draft("medusa")


# Command line


COUNTING = ["--model", counting_folder(), "--dtype", "float32"]


def test_generate_takes_a_draft(medusa):
    arguments = ["generate", "a", *COUNTING, "--tree", "chain-3", "-n", 21, "--json"]
    for draft in ("first-layers:1", counting_folder()):
        code, out, _ = medusa(*arguments, "--draft", draft)
        assert code == 0
        assert (json.loads(out)["text"], json.loads(out)["steps"]) == (spoken(range(2, 23)), 5)
    code, _, err = medusa(*arguments, "--draft", "magic")
    assert (code, err.count("\n")) == (2, 1)
    assert "draft must be" in err


def test_bench_shows_sources_side_by_side(medusa, tmp_path):
    prompts, rows = tmp_path / "prompts.txt", tmp_path / "rows.jsonl"
    prompts.write_text("a\nb\nc\n")
    drafts = f"medusa@2x2,medusa@chain-3,prompt-lookup,first-layers:1@3,{wrong_at(lambda last: last % 5 == 3)}@chain-2"
    arguments = ["bench", *COUNTING, "--heads", counting_heads_folder(), "--prompts", prompts, "-n", 21]
    arguments += ["--drafts", drafts, "--output", rows]
    code, out, _ = medusa(*arguments)
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[2:7]] == ["none:", "medusa", "medusa", "prompt-lookup", "first-layers:1"]
    assert all(line.endswith("x  3 of 3") for line in lines[2:])
    code, out, _ = medusa(*arguments, "--json")
    row = json.loads(out)
    assert [json.loads(line)["benchmark"] for line in rows.read_text().splitlines()] == ["drafts", "drafts"]
    shown = [(s["draft"], s["tree_nodes"], s["tree_depth"], s["steps"]) for s in row["sources"]]
    assert shown[:2] == [("medusa", 7, 2, 21), ("medusa", 4, 3, 15)]
    assert shown[3] == ("first-layers:1", 3, 2, 21)
    assert [s["tokens_per_step"] for s in row["sources"]][:2] == [3.0, 4.0]
    assert all(s["speedup"] > 0 and s["equal_texts"] == 3 for s in row["sources"])
    code, _, err = medusa("bench", *COUNTING, "--prompts", prompts, "--drafts", "medusa,oak")
    assert (code, err.count("\n")) == (2, 1)


def test_the_target_is_what_transformers_says():
    """The plain text that all of the above is measured by."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(random_folder(), dtype=torch.float32)
    expected, _ = continuation(model, PROMPTS[0], 20)
    assert target().with_draft("first-layers:1", tree=4).generate(PROMPTS[0], 20).token_ids == expected
