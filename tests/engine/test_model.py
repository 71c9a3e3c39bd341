"""The model's logits and greedy tokens against transformers', in fp32, for every family and kind of RoPE."""

from functools import cache, partial

import pytest
import torch
from torch import Tensor

from medusa_engine import Medusa
from medusa_engine import prefill as prefill_room
from medusa_engine.decode import Decoder
from medusa_engine.errors import CheckpointError
from medusa_engine.model import Forward
from medusa_engine.prefill import PREFILL_CHUNK
from medusa_kernels import Tree
from medusa_kernels._backends import Native
from medusa_kernels.linear import BACKENDS as LINEAR
from medusa_kernels.linear import FEW_ROWS
from tests.engine.models import (
    FOLDER,
    PROMPTS,
    continuation,
    counting_folder,
    counting_heads_folder,
    random_folder,
    random_model,
    save_model,
    whole_logits,
)

BACKENDS = ["reference", "cpu"]
# The bound: of the error, relative to the largest logit of the same row.
RELATIVE = 1e-4
DECODED = 24

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
}
VARIANTS = {
    "llama-mha": {"num_key_value_heads": 4},
    "llama-mqa": {"num_key_value_heads": 1},
    "llama-gqa3": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20, "hidden_size": 60},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-theta-eps": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "rms_norm_eps": 0.1},
    "llama-odd-sizes": {"vocab_size": 101, "intermediate_size": 77, "hidden_size": 60, "head_dim": 18},
    "mistral-mqa-tied": {"num_key_value_heads": 1, "tie_word_embeddings": True, "sliding_window": None},
    "mistral-window-unreached": {"sliding_window": 128},
    "qwen2-tied-mha": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3-tied-biased": {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 16},
}
# kind -> parameters, context, prompt length. Dynamic RoPE: the text alone goes beyond the context, or the prompt too.
ROPES = {
    "default": ({"rope_type": "default"}, 128, 40),
    "linear": ({"rope_type": "linear", "factor": 2.5}, 128, 40),
    "dynamic-crossing": ({"rope_type": "dynamic", "factor": 3.0}, 32, 20),
    "dynamic-beyond": ({"rope_type": "dynamic", "factor": 3.0}, 32, 48),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        128,
        40,
    ),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128, 40),
}


def some_prompt(length: int, vocab: int = 96) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@cache
def model_with(name: str, rope: str | None = None):
    """A transformers model, and its folder."""
    config = dict({**FAMILIES, **VARIANTS}[name])
    if rope is not None:
        parameters, context, _ = ROPES[rope]
        config |= {"rope_parameters": {"rope_theta": 500.0, **parameters}, "max_position_embeddings": context}
    model = random_model(name.split("-")[0], **config)
    return model, save_model(FOLDER / f"model-{name}-{rope}", model)


def prompt_logits(engine: Medusa, prompt: list[int], chunk: int = PREFILL_CHUNK) -> Tensor:
    """Logits (len(prompt), vocab) after every token, from causal chunks of this size."""
    cache, rows = engine.model.new_cache(1, len(prompt)), []
    cache.data.fill_(torch.nan)
    for start in range(0, len(prompt), chunk):
        piece = torch.tensor([prompt[start : start + chunk]], dtype=torch.int32)
        chain = Tree.named(f"chain-{piece.shape[1] - 1}") if piece.shape[1] > 1 else Tree.named("root")
        depths, mask = chain.depths, chain.mask_words
        forward = Forward(engine.model, cache, chain.num_nodes, depths, mask, prompt_length=len(prompt))
        forward.tokens.copy_(piece)
        forward.run()
        logits, head = engine.model.head(forward.hidden)
        head()
        rows.append(logits.float())
        cache.seqlens.add_(chain.num_nodes)
    return torch.cat(rows)


def decoded_logits(engine: Medusa, prompt: list[int], length: int) -> tuple[list[int], Tensor]:
    """Plain greedy tokens, and the logits (length - 1, vocab) all but the first were chosen from."""
    decoder = Decoder(engine.model, None, Tree.named("root"), batch=1, max_seqlen=len(prompt) + length)
    decoder.cache.data.fill_(torch.nan)
    tokens, rows = decoder.start([prompt], None), []
    while len(tokens) < length:
        tokens += decoder.step()[0]
        rows.append(decoder.logits[0, 0].float().clone())
    return tokens, torch.stack(rows)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)).max().item()


def check(model, folder, prompt: list[int], backend: str) -> None:
    engine = Medusa.from_pretrained(folder, dtype="float32", backend=backend, max_seqlen=len(prompt) + DECODED)
    assert engine.backend == backend
    assert relative_error(prompt_logits(engine, prompt), whole_logits(model, prompt)) <= RELATIVE
    tokens, logits = continuation(model, prompt, DECODED)
    ours, rows = decoded_logits(engine, prompt, DECODED)
    margin = logits.topk(2).values.diff().abs() / logits.abs().amax(-1, keepdim=True)
    assert margin.min() > RELATIVE, "the case has a near-tie: choose another seed"
    assert ours == tokens
    assert relative_error(rows, logits[1:]) <= RELATIVE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_equal_transformers(family, rope, backend):
    model, folder = model_with(family, rope)
    check(model, folder, some_prompt(ROPES[rope][2]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_transformers(name, backend):
    model, folder = model_with(name)
    check(model, folder, some_prompt(33, model.config.vocab_size), backend)


@pytest.mark.parametrize("rope", [name for name in ROPES if name != "default"])
def test_the_cases_can_tell_ropes_apart(rope):
    """What the comparisons above would show if this kind of RoPE were taken for the default one."""
    prompt = some_prompt(ROPES[rope][2])
    plain, scaled = (continuation(model_with("llama", kind)[0], prompt, DECODED) for kind in ("default", rope))
    same = next((i for i in range(DECODED) if plain[0][i] != scaled[0][i]), DECODED - 1)
    assert relative_error(scaled[1][: same + 1], plain[1][: same + 1]) > 100 * RELATIVE


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_generate(family):
    model, folder = model_with(family)
    engine = Medusa.from_pretrained(folder, dtype="float32")
    for prompt in PROMPTS:
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None)[0]
        out = engine.generate(prompt, 32, medusa=False)
        assert out.token_ids == theirs[len(prompt) :].tolist()
        assert out.text == "".join(chr(0x4E00 + i) for i in out.token_ids)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rope", "max_seqlen"), [("default", 128), ("dynamic-beyond", 160)])
def test_prefill_in_chunks_equals_one_shot(rope, max_seqlen, backend):
    model, folder = model_with("llama", rope)
    engine = Medusa.from_pretrained(folder, dtype="float32", backend=backend, max_seqlen=max_seqlen)
    for length in (1, 63, 64, 65, 127) if rope == "default" else (2 * PREFILL_CHUNK + 3,):
        prompt = some_prompt(length)
        theirs = whole_logits(model, prompt)
        one_shot = prompt_logits(engine, prompt, chunk=256)
        assert relative_error(one_shot, theirs) <= RELATIVE
        for chunk in (PREFILL_CHUNK, 7):
            chunked = prompt_logits(engine, prompt, chunk)
            if backend == "cpu":
                assert torch.equal(chunked, one_shot)
            assert relative_error(chunked, one_shot) <= RELATIVE
        assert engine.generate(prompt, 1, medusa=False).token_ids == [int(theirs[-1].argmax())]


def test_prefill_is_the_same_with_guesses_and_without(monkeypatch):
    """The same chunks by the same launches, so both decode from the same bits, on a GPU too."""
    engine = Medusa.from_pretrained(counting_folder(), counting_heads_folder(4), dtype="float32", tree="4x2x2")
    prompt, seen = [1 + i % 20 for i in range(PREFILL_CHUNK + 5)], []

    class Watched(Forward):
        def __init__(self, model, cache, n, *layout, **options):
            seen.append((model.launch, cache.batch, n))
            super().__init__(model, cache, n, *layout, **options)

    monkeypatch.setattr(prefill_room, "Forward", Watched)
    begun = []
    for medusa in (False, True):
        decoder = engine._take_steps(1, 100, engine.tree(1, medusa), medusa).decoder
        begun.append((decoder.start([prompt], None), decoder.cache.data[:, :, :, : len(prompt)], decoder.root_hidden))
    assert seen == 2 * [(engine.model.launch, 1, n) for n in (PREFILL_CHUNK, 5)]
    assert begun[0][0] == begun[1][0]
    assert all(torch.equal(a, b) for a, b in zip(begun[0][1:], begun[1][1:], strict=True))


@pytest.mark.parametrize("name", ["llama", "llama-biased"])
def test_many_rows_as_on_a_gpu(name, monkeypatch):
    """A prompt's chunks in bf16 through CUDA's choice of product, the residual being the output, against fp32."""
    model, folder = model_with(name)
    engine = Medusa.from_pretrained(folder, dtype="bfloat16", backend="reference")
    engine.model.activation_dtype = torch.bfloat16
    prompt = some_prompt(PREFILL_CHUNK + FEW_ROWS + 1)
    reference, launch = prompt_logits(engine, prompt), LINEAR["cuda"]
    few = []

    def bound(self: Native, *tensors):
        few.append(tensors)
        return partial(LINEAR["reference"], *tensors)

    monkeypatch.setattr(Native, "bind", bound)
    engine.model.launch["linear"] = launch
    by_product = prompt_logits(engine, prompt)
    assert not few
    exact = whole_logits(model, prompt)
    rounding, error = (((logits - exact).norm() / exact.norm()).item() for logits in (reference, by_product))
    assert error <= 1.2 * rounding < 0.1
    decoded_logits(engine, prompt, 3)
    assert {len(x) for x, *_ in few} == {1}


def test_dynamic_rope_forgets_the_last_prompt():
    """A prompt's frequencies depend on its own length, whatever was decoded before it or stands beside it."""
    _, folder = model_with("llama", "dynamic-beyond")
    prompts = [some_prompt(n) for n in (60, 20, 40, 33)]

    def fresh() -> Medusa:
        return Medusa.from_pretrained(folder, dtype="float32", max_seqlen=96)

    alone = [fresh().generate(p, 20, medusa=False).token_ids for p in prompts]
    engine = fresh()
    assert [engine.generate(p, 20, medusa=False).token_ids for p in prompts] == alone
    assert engine.generate(prompts, 20, medusa=False).token_ids == alone
    assert len(engine.model._tables) == 2  # decoding's, and the last prompt's


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_narrow_weights_stay_near(dtype):
    """Rounding a weight to 2^-9 of itself, or to 1/254 of its row's largest, moves the logits a few times as much."""
    model, folder = model_with("llama")
    prompt = some_prompt(40)
    theirs = whole_logits(model, prompt)
    engine = Medusa.from_pretrained(folder, dtype=dtype)
    assert (engine.dtype, engine.model.dtype) == (dtype, torch.bfloat16)
    error = ((prompt_logits(engine, prompt) - theirs).norm() / theirs.norm()).item()
    assert 1e-4 < error < {"bfloat16": 0.03, "int8": 0.2}[dtype]


def test_bf16_weights_with_fp32_activations():
    """On the CPU bfloat16 rounds weights and K/V alone: from the same weights PyTorch's bf16 is further off."""
    _, folder = model_with("llama")
    prompt = some_prompt(40)
    rounded = random_model("llama")
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if "norm" not in name:
                parameter.copy_(parameter.bfloat16())
    exact = whole_logits(rounded, prompt)
    plain = whole_logits(rounded.bfloat16(), prompt)
    ours = prompt_logits(Medusa.from_pretrained(folder, dtype="bfloat16"), prompt)
    assert (ours - exact).norm() < 0.5 * (plain - exact).norm()


def test_a_missing_tensor_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(random_folder() / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((random_folder() / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight\) missing"):
        Medusa.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def smollm2(default_model):
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32)
    return theirs, Medusa.from_pretrained(default_model, dtype="float32", max_seqlen=256)


def test_smollm2_equals_transformers(smollm2):
    theirs, engine = smollm2
    texts = [
        "Gravity is",
        "def fibonacci(n):\n    if n < 2:\n",
        "In 1492, Columbus sailed the ocean blue. The people he met spoke languages he had never heard before, and",
    ]
    prompts = [engine.tokenizer.encode(text) for text in texts] + [engine.tokenizer.encode_chat("Why is the sky blue?")]
    for prompt in prompts:
        assert relative_error(prompt_logits(engine, prompt), whole_logits(theirs, prompt)) <= RELATIVE
    for prompt in prompts[:2]:
        tokens, logits = continuation(theirs, prompt, 16)
        ours, rows = decoded_logits(engine, prompt, 16)
        # A difference is allowed at a near-tie alone, which is reported; behind it the texts have parted.
        parted = next((i for i in range(16) if ours[i] != tokens[i]), 16)
        if parted < 16:
            top = logits[parted].topk(2).values
            margin = ((top[0] - top[1]) / logits[parted].abs().max()).item()
            print(f"near-tie at token {parted}: relative margin {margin:.2e}")
            assert margin <= 2 * RELATIVE
        assert parted > 0
        assert relative_error(rows[: parted - 1], logits[1:parted]) <= RELATIVE
    generated = theirs.generate(torch.tensor([prompts[0]]), max_new_tokens=8, do_sample=False)[0].tolist()
    assert generated[len(prompts[0]) :] == engine.generate(prompts[0], 8, medusa=False).token_ids


def test_smollm2_reference_backend(smollm2, default_model):
    _, engine = smollm2
    prompt = engine.tokenizer.encode("Gravity is")
    reference = Medusa.from_pretrained(default_model, dtype="float32", backend="reference", max_seqlen=64)
    assert relative_error(prompt_logits(reference, prompt), prompt_logits(engine, prompt)) <= RELATIVE
    assert reference.generate(prompt, 6, medusa=False).token_ids == engine.generate(prompt, 6, medusa=False).token_ids
