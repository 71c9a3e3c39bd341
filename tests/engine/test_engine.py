"""What Medusa.from_pretrained loads, ragged batches, chat templates and limits. Mistakes: test_engine_mistakes.py."""

import itertools
import json
import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_engine import Medusa, Output
from medusa_engine.decode import Decoder
from medusa_engine.engine import DEFAULT_HEADS
from medusa_engine.errors import CheckpointError
from medusa_engine.heads import HeadsError
from medusa_engine.heads_files import load_heads, save_heads
from medusa_kernels import Tree
from tests.engine.models import (
    FOLDER,
    PROMPTS,
    continuation,
    counting_folder,
    counting_heads,
    counting_heads_folder,
    fitted_heads,
    random_folder,
    random_model,
    save_model,
    spoken,
    token,
    write_counting,
)

TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}b{% endif %}"
RAGGED = ([7], *PROMPTS, list(range(70)), [3, 3, 3, 50, 51], list(range(90, 20, -1)))


def load(model=None, heads=None, **options) -> Medusa:
    return Medusa.from_pretrained(model or counting_folder(), heads, **{"dtype": "float32", **options})


@cache
def fitted_folder():
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(random_folder(), dtype=torch.float32)
    folder = FOLDER / "engine-fitted"
    save_heads(folder, fitted_heads(model, PROMPTS, num_heads=4), dtype=torch.float32)
    return folder


@cache
def random_engine(backend: str, tree: str | int, dtype: str = "float32") -> Medusa:
    return load(random_folder(), fitted_folder(), backend=backend, tree=tree, dtype=dtype)


# Batches


@pytest.mark.parametrize("medusa", [True, False])
@pytest.mark.parametrize(
    ("backend", "tree", "dtype"),
    [("cpu", "chain-3", "float32"), ("cpu", 24, "float32"), ("cpu", 24, "bfloat16"), ("reference", "4x2", "float32")],
)
def test_a_batch_is_its_prompts_one_by_one(backend, tree, dtype, medusa):
    engine = random_engine(backend, tree, dtype)
    prompts = RAGGED if backend == "cpu" else RAGGED[:4]
    alone = [engine.generate(p, 24, medusa=medusa) for p in prompts]
    assert len({tuple(out.token_ids) for out in alone}) > 2
    for order in ([*range(len(prompts))], [*range(len(prompts))][::-1]):
        out = engine.generate([prompts[i] for i in order], 24, medusa=medusa)
        assert out.token_ids == [alone[i].token_ids for i in order]
        assert out.text == [alone[i].text for i in order]
        assert [s.steps for s in out.stats.per_sequence] == [alone[i].stats.steps for i in order]
        assert [s.accepted for s in out.stats.per_sequence] == [alone[i].stats.accepted for i in order]
    assert max(a.stats.tokens_per_step for a in alone) > 1.5 if medusa else alone[0].stats.tokens_per_step == 1.0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pytorch_s_default_device_and_dtype_do_not_matter(backend):
    def texts():
        engine = load(random_folder(), fitted_folder(), backend=backend, tree=8)
        sampled = {"mode": "lossless", "temperature": 0.7, "top_p": 0.9, "seed": 3}
        yield engine.generate(list(PROMPTS), 12).token_ids
        yield [chunk.token_ids for chunk in engine.stream(PROMPTS[0], 8)]
        for draft, tree in (("medusa", "dynamic-6"), ("prompt-lookup", 4), ("first-layers:1", 4)):
            yield engine.with_draft(draft, tree=tree).generate(list(PROMPTS), 6, **sampled).token_ids

    expected, dtype = list(texts()), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            assert list(texts()) == expected
    finally:
        torch.set_default_dtype(dtype)


def test_sequences_that_end_leave_the_others_alone():
    """EOS, stop strings and the limit end sequences at different steps; the rest go on as if alone."""
    engine = load(heads=counting_heads_folder(4, patchy=True), tree="chain-4")
    prompts = ["V", "a", "P", "G", "w", [token("V"), token("V")]]
    alone = [engine.generate(p, 30, stop=["stop", "IJ"]) for p in prompts]
    assert {out.finish_reason for out in alone} == {"eos", "stop", "length"}
    for order in itertools.islice(itertools.permutations(range(len(prompts))), 0, 720, 97):
        out = engine.generate([prompts[i] for i in order], 30, stop=["stop", "IJ"])
        for name in ("token_ids", "text", "finish_reason"):
            assert getattr(out, name) == [getattr(alone[i], name) for i in order]


def test_a_batch_of_prompts_that_all_end_at_once():
    engine = load(heads=counting_heads_folder())
    out = engine.generate(["V", "V"], 9)
    assert (out.token_ids, out.text, out.finish_reason) == ([[0], [0]], ["", ""], ["eos", "eos"])
    assert (out.stats.steps, out.stats.tokens_per_step, out.stats.tokens_per_second) == (0, 1.0, 0.0)


def test_one_prompt_or_many():
    engine = load(heads=counting_heads_folder())
    one, ids = engine.generate("ab", 3), engine.generate([token("a"), token("b")], 3)
    assert isinstance(one, Output)
    assert (one.text, one.token_ids, one.finish_reason) == ("cde", [3, 4, 5], "length")
    assert (ids.text, ids.token_ids) == (one.text, one.token_ids)
    for many in (["ab"], [[1, 2]], ("ab",), [(1, 2)]):
        out = engine.generate(many, 3)
        assert (out.text, out.token_ids, out.finish_reason) == (["cde"], [[3, 4, 5]], ["length"])
    assert engine.generate(["ab", [1, 2]], 3).text == ["cde", "cde"]


def test_numpy_integers_are_integers():
    engine, prompt = load(heads=counting_heads_folder()), [token("a"), token("b")]
    expected = engine.generate(prompt, 9, mode="lossless", seed=3).token_ids
    assert engine.generate(list(np.array(prompt)), np.int64(9), mode="lossless", seed=np.int64(3)).token_ids == expected


def test_the_text_of_the_whole_wheel():
    out = load(heads=counting_heads_folder()).generate([0], 63)
    assert out.text == spoken(range(1, 64))


def test_max_seqlen_is_filled_to_the_last_row():
    prompt = list(range(1, 41))
    whole = random_engine("cpu", "chain-3").generate(prompt, 40)
    tight = load(random_folder(), fitted_folder(), tree="chain-3", max_seqlen=60)
    for medusa in (True, False):
        assert tight.generate(prompt, 20, medusa=medusa).token_ids == whole.token_ids[:20]
        assert tight.generate([prompt, [5]], 20, medusa=medusa).token_ids[0] == whole.token_ids[:20]
    roomy = random_engine("cpu", "chain-3")
    assert tight.generate(prompt[:1], 59).token_ids == roomy.generate(prompt[:1], 59).token_ids


def test_decoders_are_reused_only_where_they_fit():
    """Calls of all sizes in a row, each as if it were the first."""
    engine = random_engine("cpu", "chain-3")
    calls = [(RAGGED[:2], 8), (RAGGED[:1], 8), (RAGGED[4:5], 50), (RAGGED[:1], 8), (RAGGED[4:], 8), (RAGGED[:2], 30)]
    first = [load(random_folder(), fitted_folder(), tree="chain-3").generate(p, n).token_ids for p, n in calls]
    assert [engine.generate(p, n).token_ids for p, n in calls] == first


def test_a_longer_text_gets_a_longer_cache(tmp_path, monkeypatch):
    engine = load(write_counting(tmp_path, max_position_embeddings=1024))
    caches = []
    start = Decoder.start

    def watched(decoder: Decoder, *arguments) -> list[int]:
        caches.append(decoder.max_seqlen)
        assert decoder.max_seqlen > count
        return start(decoder, *arguments)

    monkeypatch.setattr(Decoder, "start", watched)
    for count in (10, 300, 20, 1023):
        assert engine.generate("a", count, medusa=False, ignore_eos=True).token_ids == [
            (2 + i) % 64 for i in range(count)
        ]
    assert caches == [256, 512, 512, 1024]


# Chat templates


def test_a_str_goes_through_the_chat_template(tmp_path):
    engine = load(write_counting(tmp_path, chat_template=TEMPLATE))
    assert engine.generate("x", 2, medusa=False).text == "cd"  # <x>b, and then c
    assert engine.generate(["x", "y"], 2, medusa=False).text == ["cd", "cd"]
    assert engine.generate("x", 2, medusa=False, chat=False).text == "yz"
    assert engine.generate([token("x")], 2, medusa=False).text == "yz"
    assert "".join(c.text for c in engine.stream("x", 2, medusa=False)) == "cd"
    assert "".join(c.text for c in engine.stream("x", 2, medusa=False, chat=False)) == "yz"


# What from_pretrained loads


def test_no_heads_is_plain_decoding_only():
    engine = load()
    assert engine.heads is None
    assert engine.generate("a", 4, medusa=False).text == "bcde"
    for call in (engine.generate, engine.stream):
        with pytest.raises(ValueError, match=r"no Medusa heads: pass heads=\.\.\. to from_pretrained, or medusa=False"):
            call("a", 4)


def test_heads_from_a_folder_or_a_file():
    folder = counting_heads_folder()
    for heads in (folder, str(folder), folder / "medusa_lm_head.safetensors"):
        assert load(heads=heads, tree="chain-3").generate("a", 21).stats.tokens_per_step == 4.0


def test_a_folder_of_heads_names_its_base(tmp_path):
    heads = load_heads(counting_heads_folder())
    named = replace(heads, base_model_name_or_path=str(counting_folder()))
    save_heads(tmp_path / "named", named, dtype=torch.float32)
    engine = load(tmp_path / "named", tree="chain-3")
    assert engine.generate("a", 21).stats.tokens_per_step == 4.0
    with pytest.raises(ValueError, match="holds only Medusa heads, so heads must be None"):
        load(tmp_path / "named", counting_heads_folder())
    save_heads(tmp_path / "nameless", heads)
    with pytest.raises(ValueError, match="holds only Medusa heads and names no base_model_name_or_path"):
        load(tmp_path / "nameless")


def test_a_base_named_relative_to_its_heads(tmp_path):
    write_counting(tmp_path / "base")
    heads = replace(load_heads(counting_heads_folder()), base_model_name_or_path="../base")
    save_heads(tmp_path / "heads", heads, dtype=torch.float32)
    assert load(tmp_path / "heads", tree="chain-3").generate("a", 21).stats.tokens_per_step == 4.0


@pytest.mark.parametrize("prefix", ["medusa_head.", "medusa_heads."])
def test_heads_inside_the_model(tmp_path, prefix):
    folder = write_counting(tmp_path)
    heads = load_file(counting_heads_folder() / "medusa_lm_head.safetensors")
    heads |= {name[:-6] + "bias": torch.zeros(len(w)) for name, w in heads.items() if name.endswith("linear.weight")}
    inside = {prefix + name: tensor for name, tensor in heads.items()}
    save_file(load_file(folder / "model.safetensors") | inside, folder / "model.safetensors")
    assert load(folder, tree="chain-3").generate("a", 21).stats.tokens_per_step == 4.0


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_heads_on_the_hub_name_their_base(tmp_path, monkeypatch, suffix):
    """Heads in PyTorch's own format are fetched as well, though only where there is nothing safer."""
    heads = replace(load_heads(counting_heads_folder()), base_model_name_or_path="org/base")
    save_heads(tmp_path / "there", heads, dtype=torch.float32)
    if suffix == "pt":
        file = tmp_path / "there" / "medusa_lm_head.safetensors"
        torch.save(load_file(file), file.with_suffix(".pt"))
        file.unlink()

    def snapshot_download(repo, *, allow_patterns, ignore_patterns=()):
        if repo == "org/base":
            return str(counting_folder())
        here = tmp_path / "here"
        for file in (tmp_path / "there").iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                here.mkdir(exist_ok=True)
                shutil.copy(file, here)
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load("org/heads", tree="chain-3").generate("a", 21).stats.tokens_per_step == 4.0
    assert load("org/heads", draft="prompt-lookup").heads is None


def test_medusa_2_heads_inside_the_model(tmp_path):
    shutil.copytree(counting_folder(), tmp_path, dirs_exist_ok=True)
    heads = counting_heads(3)
    tensors = load_file(tmp_path / "model.safetensors")
    for h in range(3):
        tensors[f"medusa_head.{h}.0.linear.weight"] = heads.block_weight[h, 0].clone()
        tensors[f"medusa_head.{h}.0.linear.bias"] = torch.zeros(64)
        tensors[f"medusa_head.{h}.1.weight"] = heads.lm_head_weight[h].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    engine = load(tmp_path, tree="chain-5")
    assert engine.heads.num_heads == 3
    assert engine.tree(1).choices == Tree.named("chain-3").choices
    assert engine.generate("a", 21).stats.tokens_per_step == 4.0
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "accuracy": [[0.5, 0.4]]}))
    assert load(tmp_path, tree=3).tree(1).choices == load(tmp_path, tmp_path, tree=3).tree(1).choices == [[0], [1]]
    assert load(tmp_path, counting_heads_folder(4), tree="chain-5").heads.num_heads == 4  # heads given win
    del tensors["medusa_head.1.0.linear.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HeadsError, match=r"missing .*1\.0\.linear\.bias"):
        load(tmp_path)


def test_the_default_is_smollm2_with_its_heads(default_model):
    engine = Medusa.from_pretrained(max_seqlen=512)
    assert (engine.dtype, engine.model.config.vocab_size) == ("bfloat16", 49152)
    assert engine.heads.num_heads == load_heads(DEFAULT_HEADS).num_heads
    prompts = ["Why is the sky blue?", "Write a haiku about rain."]
    fast, plain = engine.generate(prompts, 24), engine.generate(prompts, 24, medusa=False)
    assert fast.token_ids == plain.token_ids
    assert fast.stats.tokens_per_step > 1.2
    assert "<|im_end|>" not in "".join(fast.text)


def test_int8_weights():
    engine = load(random_folder(), fitted_folder(), dtype="int8", tree="chain-3")
    assert engine.dtype == "int8"
    assert engine.generate(PROMPTS, 24).token_ids == engine.generate(PROMPTS, 24, medusa=False).token_ids


def test_a_checkpoint_without_eos_or_tokenizer(tmp_path):
    folder = write_counting(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    # config.json is silent: the tokenizer's eos_token counts
    assert load(folder).generate([token("V")], 5, medusa=False).finish_reason == "eos"
    (folder / "tokenizer.json").unlink()
    silent = load(folder)
    out = silent.generate([token("V")], 5, medusa=False)
    assert (len(out.token_ids), out.text, out.finish_reason) == (5, "", "length")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json or tokenizer\.model: .* or pass token ids"):
        silent.generate("V", 5, medusa=False)
    with pytest.raises(ValueError, match=r"stop needs text: .* has no tokenizer\.json"):
        silent.generate([token("V")], 5, medusa=False, stop="W")


def test_an_lm_head_beside_tied_embeddings_is_used(tmp_path):
    """As transformers reads such a checkpoint."""
    model = random_model("llama", tie_word_embeddings=False)
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = model.lm_head.weight.detach().clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert load(tmp_path).generate(PROMPTS[0], 12, medusa=False).token_ids == continuation(model, PROMPTS[0], 12)[0]


def test_weights_of_double_precision(tmp_path):
    model = random_model("llama")
    single, double = save_model(tmp_path / "single", model), save_model(tmp_path / "double", model.double())
    ids = [load(folder).generate(PROMPTS[0], 12, medusa=False).token_ids for folder in (single, double)]
    assert ids[0] == ids[1]


# Limits


def test_max_seqlen_defaults_to_the_context(tmp_path):
    assert load().max_seqlen == 128
    assert load(max_seqlen=100).max_seqlen == 100
    assert load(write_counting(tmp_path / "long", max_position_embeddings=10000)).max_seqlen == 4096
    with pytest.raises(ValueError, match="max_seqlen 129 is more than the model allows: its context is 128"):
        load(max_seqlen=129)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert load(write_counting(tmp_path / "dynamic", rope_parameters=dynamic), max_seqlen=500).max_seqlen == 500
    assert load(tmp_path / "dynamic").max_seqlen == 128
    for kind, extra in (("linear", {}), ("yarn", {"original_max_position_embeddings": 128})):
        rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4, **extra}
        folder = write_counting(tmp_path / kind, rope_parameters=rope)
        assert (load(folder).max_seqlen, load(folder, max_seqlen=512).max_seqlen) == (128, 512)
        with pytest.raises(ValueError, match="max_seqlen 513 is more than the model allows: its context is 512"):
            load(folder, max_seqlen=513)
    for wrong in (1, 0, -5, 2.5, True, "100"):
        with pytest.raises(ValueError, match="max_seqlen must be an int of at least 2, not"):
            load(max_seqlen=wrong)


def test_a_sliding_window_caps_max_seqlen(tmp_path):
    folder = save_model(tmp_path, random_model("mistral", sliding_window=32))
    assert load(folder).max_seqlen == 32
    with pytest.raises(ValueError, match="max_seqlen 33 is more than the model allows: its sliding window is 32"):
        load(folder, max_seqlen=33)
    with pytest.raises(ValueError, match=r"prompt of 20 tokens \+ max_new_tokens 13 exceeds max_seqlen 32"):
        load(folder).generate([1] * 20, 13, medusa=False)
