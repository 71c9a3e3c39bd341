"""Medusa.from_pretrained and generate: one clear line for each mistake."""

import numpy as np
import pytest
import torch

from medusa_engine import Medusa
from medusa_engine.heads import HeadsError
from medusa_engine.heads_files import load_heads, save_heads
from tests.engine.models import counting_folder, counting_heads_folder, random_model, save_model


def load(model=None, heads=None, **options) -> Medusa:
    return Medusa.from_pretrained(model or counting_folder(), heads, **{"dtype": "float32", **options})


LOAD_MISTAKES = [
    (
        {"draft": "magic", "heads": None},
        r"draft must be 'medusa', 'prompt-lookup', 'first-layers:N' or .*, not 'magic'",
    ),
    ({"dtype": "float8"}, r"dtype on cpu must be one of 'float32', 'bfloat16', 'int8', not 'float8'"),
    ({"dtype": "float16"}, r"dtype on cpu must be one of .*, not 'float16'"),
    ({"dtype": torch.float32}, r"dtype on cpu must be one of .*, not torch\.float32"),
    ({"backend": "tpu"}, r"backend must be 'auto' or one of .*, not 'tpu'"),
    ({"backend": "cuda", "device": "cpu"}, r"backend 'cuda' (is not available|takes tensors on a cuda device)"),
    ({"device": "mps"}, r"device must be a CPU or CUDA device, not 'mps'"),
    ({"device": "toaster"}, r"device must be a CPU or CUDA device, not 'toaster'"),
    ({"bitwise": True, "backend": "reference"}, r"bitwise=True runs on backends 'cpu' and 'cuda' alone"),
    ({"dtype": "int8", "backend": "reference"}, r"dtype 'int8' runs on backend 'cpu' alone, not on 'reference'"),
    ({"tree": "oak"}, r"name 'oak' is no known tree"),
    ({"tree": 0}, r"tree as a number of nodes must be between 1 and 256, not 0"),
    ({"tree": 257}, r"must be between 1 and 256, not 257"),
    ({"tree": [[1, 0]]}, r"its parent \[1\] is missing"),
    ({"tree": [[0], [0]]}, r"\[0\]"),
    ({"tree": 2.5}, r"choices is float 2\.5; it must be a list of lists of ranks"),
    ({"tree": None}, r"choices is NoneType None; it must be a list of lists of ranks"),
    ({"model": "/no/such/folder"}, r"/no/such/folder: no such file or folder"),
    ({"heads": "/no/such/heads"}, r"no heads at /no/such/heads"),
]


@pytest.mark.parametrize(("options", "message"), LOAD_MISTAKES, ids=lambda case: str(case)[:40])
def test_mistakes_in_from_pretrained(options, message):
    options = {"model": counting_folder(), "heads": counting_heads_folder(), **options}
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        Medusa.from_pretrained(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what is said where there is no GPU")
@pytest.mark.parametrize(
    "options", [{"backend": "cuda"}, {"backend": "triton"}, {"device": "cuda"}, {"backend": "cuda", "device": "cuda"}]
)
def test_cuda_without_a_gpu(options):
    with pytest.raises(ValueError, match=r"CUDA") as caught:
        load(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "vocab", "message"),
    [(32, 64, r"has shape \(32, 32\); it must be \(64, 64\)"), (64, 60, "vocabulary|rows|shape")],
)
def test_heads_of_another_model(tmp_path, size, vocab, message):
    heads = load_heads(counting_heads_folder())
    wrong = type(heads)(heads.block_weight[..., :size, :size], None, heads.lm_head_weight[:, :vocab, :size])
    save_heads(tmp_path, wrong)
    with pytest.raises(HeadsError, match=message):
        load(heads=tmp_path)


@pytest.mark.parametrize("head_dim", [258, 320])
def test_heads_wider_than_the_kernels(tmp_path, head_dim):
    sizes = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": head_dim}
    folder = save_model(tmp_path, random_model("llama", **sizes))
    with pytest.raises(ValueError, match=rf"head_dim {head_dim} does not run on backend 'cpu': it must be at most 256"):
        load(folder, backend="cpu")
    assert len(load(folder, backend="reference").generate([1], 3, medusa=False).token_ids) == 3


PROMPT_MISTAKES = [
    ("", ValueError, r"prompt is empty"),
    ([], ValueError, r"prompt is empty"),
    ([""], ValueError, r"prompts\[0\] is empty"),
    (["a", []], ValueError, r"prompts\[1\] is empty"),
    (5, TypeError, r"prompts must be a str, a list of token ids, or a list of those, not int"),
    (None, TypeError, r"prompts must be .* not NoneType"),
    ([1.5], TypeError, r"prompts\[0\] must be a str or a list of token ids, not 1\.5"),
    ([[1, "a"]], TypeError, r"prompts\[0\] must be a str or a list of token ids, not \[1, 'a'\]"),
    ([True], TypeError, r"prompts\[0\] must be"),
    ([[[1]]], TypeError, r"prompts\[0\] must be"),
    (b"ab", TypeError, r"prompts must be .* not bytes"),
    ([b"ab"], TypeError, r"prompts\[0\] must be a str or a list of token ids, not b'ab'"),
    (np.array([1, 2]), TypeError, r"prompts must be .* not ndarray"),
    ([64], ValueError, r"prompt holds token id 64; ids must be between 0 and 63"),
    ([[1], [-1]], ValueError, r"prompts\[1\] holds token id -1; ids must be between 0 and 63"),
    ("漢", ValueError, r"prompt has no tokens: '漢'"),
    ("\ud800", ValueError, r"unpaired surrogate"),
]


@pytest.mark.parametrize(("prompts", "kind", "message"), PROMPT_MISTAKES, ids=lambda case: ascii(case)[:30])
def test_mistakes_in_prompts(prompts, kind, message):
    with pytest.raises(kind, match=message) as caught:
        load().generate(prompts, medusa=False)
    assert "\n" not in str(caught.value)


def test_a_text_whose_token_has_no_row_in_the_embedding(monkeypatch):
    """A tokenizer may know tokens that were added to it and never to the model."""
    engine = load()
    monkeypatch.setattr(engine.tokenizer, "encode", lambda text: [1, 10_000])
    with pytest.raises(ValueError, match=r"prompt holds token id 10000; ids must be between 0 and"):
        engine.generate("a", 4, chat=False)


def test_check_refuses_what_generate_would_and_keeps_the_decoder(monkeypatch):
    engine = load()
    monkeypatch.setattr("medusa_engine.decode.Decoder.start", lambda *_: pytest.fail("work was done"))
    engine.check(["a", "a" * 120], 8, medusa=False)
    bound = engine._steps[False]
    engine.check(["a"], 8, medusa=False, mode="lossless", temperature=0.5)
    assert engine._steps[False] is bound
    with pytest.raises(ValueError, match=r"prompt of 121 tokens \+ max_new_tokens 8 exceeds max_seqlen 128"):
        engine.check(["a", "a" * 121], 8, medusa=False)
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        engine.check(["a", ""], 8, medusa=False)
    with pytest.raises(ValueError, match="this model has no Medusa heads"):
        engine.check(["a"], 8)


def test_too_long_is_an_error_before_any_work(monkeypatch):
    engine = load(heads=counting_heads_folder())
    monkeypatch.setattr("medusa_engine.decode.Decoder.start", lambda *_: pytest.fail("work was done"))
    for prompts, count in (("a" * 129, 1), ("a" * 100, 29), (["a", "a" * 121], 8), ("a", 128), ("a", 10**9)):
        with pytest.raises(ValueError, match=r"prompt of \d+ tokens \+ max_new_tokens \d+ exceeds max_seqlen 128"):
            engine.generate(prompts, count)
    with pytest.raises(ValueError, match="exceeds max_seqlen 128"):
        engine.stream("a" * 129, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens must be an int of at least 1, not 0"),
        ({"max_new_tokens": -1}, r"not -1"),
        ({"max_new_tokens": 1.0}, r"not 1\.0"),
        ({"max_new_tokens": True}, r"not True"),
        ({"stop": ""}, r"stop must be a non-empty string or several"),
        ({"stop": ["a", ""]}, r"stop must be a non-empty string or several"),
        ({"stop": [5]}, r"stop must be a non-empty string or several"),
        ({"stop": 5}, r"stop must be a non-empty string or several, not 5"),
        ({"frequency_penalty": 1.0}, r"frequency_penalty"),
    ],
    ids=str,
)
def test_mistakes_in_options(options, message):
    engine = load(heads=counting_heads_folder())
    for call in (engine.generate, engine.stream):
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            call("a", **{"max_new_tokens": 4, **options})
        assert "\n" not in str(caught.value)


def test_stream_takes_one_prompt():
    with pytest.raises(ValueError, match="stream takes one prompt"):
        load().stream(["a", "b"], medusa=False)
