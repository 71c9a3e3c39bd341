"""cos/sin tables against transformers, for every kind of RoPE and every way to write it down."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from medusa_engine.rope import RopeConfig, rope_tables

HEAD_DIM, POSITIONS = 64, 300
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "llama3-real": {"rope_type": "llama3", **LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn-attention-factor": {"rope_type": "yarn", **YARN, "attention_factor": 1.7},
    "yarn-mscale": {"rope_type": "yarn", **YARN, "mscale": 0.707, "mscale_all_dim": 0.4},
    "yarn-mscale-zero": {"rope_type": "yarn", **YARN, "mscale": 1.0, "mscale_all_dim": 0.0},
    "yarn-no-truncate": {"rope_type": "yarn", **YARN, "truncate": False},
    "yarn-betas": {"rope_type": "yarn", **YARN, "beta_fast": 16, "beta_slow": 2},
    "yarn-betas-null": {"rope_type": "yarn", **YARN, "beta_fast": None, "beta_slow": None},
    "yarn-no-extension": {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 256},
}


def llama_config(parameters: dict, **overrides) -> LlamaConfig:
    sizes = {"hidden_size": 4 * HEAD_DIM, "num_attention_heads": 4, "max_position_embeddings": 256}
    theta = overrides.pop("theta", 50000.0)
    # a copy: transformers fills defaults into the dict it is given
    return LlamaConfig(**{**sizes, **overrides}, rope_parameters={"rope_theta": theta, **parameters})


def theirs(config: LlamaConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    return cos[0, :, : cos.shape[-1] // 2], sin[0, :, : sin.shape[-1] // 2]


@pytest.mark.parametrize("parameters", KINDS.values(), ids=KINDS)
def test_tables_equal_transformers(parameters):
    config = llama_config(parameters)
    rope = RopeConfig.from_hf(config.to_dict(), 256)
    cos, sin = rope_tables(rope, HEAD_DIM, POSITIONS)
    expected_cos, expected_sin = theirs(config, torch.arange(POSITIONS))
    assert cos.dtype == torch.float32
    assert cos.shape == (POSITIONS, HEAD_DIM // 2)
    assert torch.equal(cos, expected_cos)
    assert torch.equal(sin, expected_sin)


@pytest.mark.parametrize("parameters", KINDS.values(), ids=KINDS)
def test_transformers_4_spelling(parameters):
    scaling = {key: value for key, value in parameters.items() if key != "rope_type"}
    old = {"rope_theta": 50000.0, "rope_scaling": {"type": parameters["rope_type"], **scaling}}
    new = {"rope_parameters": {"rope_theta": 50000.0, **parameters}}
    assert RopeConfig.from_hf(old, 256) == RopeConfig.from_hf(new, 256)
    if parameters["rope_type"] == "default":
        assert RopeConfig.from_hf({**old, "rope_scaling": None}, 256) == RopeConfig.from_hf(new, 256)


@pytest.mark.parametrize("parameters", KINDS.values(), ids=KINDS)
def test_written_parameters_read_back(parameters):
    rope = RopeConfig.from_hf({"rope_parameters": {"rope_theta": 50000.0, **parameters}}, 256)
    written = rope.to_hf(256)
    assert RopeConfig.from_hf({"rope_parameters": written}, 256) == rope
    cos, _ = rope_tables(rope, HEAD_DIM, POSITIONS)
    assert torch.equal(cos, theirs(llama_config(written), torch.arange(POSITIONS))[0])


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn"])
@pytest.mark.parametrize("partial", [0.25, 0.5])
def test_partial_rotation(kind, partial):
    parameters = {"linear": {"factor": 2.0}, "dynamic": {"factor": 2.0}, "llama3": LLAMA3, "yarn": YARN}[kind]
    config = llama_config({"rope_type": kind, **parameters, "partial_rotary_factor": partial})
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, seq_len=200)
    angles = torch.arange(POSITIONS).float()[:, None] * frequencies
    cos, sin = rope_tables(RopeConfig.from_hf(config.to_dict(), 256), HEAD_DIM, POSITIONS, seqlen=200)
    assert cos.shape == (POSITIONS, HEAD_DIM * partial / 2)
    assert torch.equal(cos, angles.cos() * scale)
    assert torch.equal(sin, angles.sin() * scale)


@pytest.mark.parametrize("length", [1, 256, 257, 400, 1000])
def test_dynamic_prefill_uses_the_prompt_length(length):
    config = llama_config({"rope_type": "dynamic", "factor": 3.0})
    rope = RopeConfig.from_hf(config.to_dict(), 256)
    cos, sin = rope_tables(rope, HEAD_DIM, length, seqlen=length)
    expected_cos, expected_sin = theirs(config, torch.arange(length))
    torch.testing.assert_close(cos, expected_cos, rtol=0, atol=2e-4)  # theirs computes theta in fp32: angles up to 1000
    torch.testing.assert_close(sin, expected_sin, rtol=0, atol=2e-4)
    exact, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=length)
    assert torch.equal(cos, (torch.arange(length).float()[:, None] * exact).cos())


def test_dynamic_decoding_uses_each_positions_own_length():
    config = llama_config({"rope_type": "dynamic", "factor": 3.0})
    cos, sin = rope_tables(RopeConfig.from_hf(config.to_dict(), 256), HEAD_DIM, 600)
    rotary = LlamaRotaryEmbedding(config)
    for position in (0, 1, 255, 256, 257, 400, 599):
        frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=position + 1)
        torch.testing.assert_close(cos[position], (position * frequencies).cos(), rtol=0, atol=5e-5)
        torch.testing.assert_close(sin[position], (position * frequencies).sin(), rtol=0, atol=5e-5)
        decoded, _ = rotary(torch.zeros(1), torch.tensor([[position]]))  # as generate() calls it, step by step
        torch.testing.assert_close(cos[position], decoded[0, 0, : HEAD_DIM // 2], rtol=0, atol=2e-4)
    assert not torch.allclose(cos[599], rope_tables(RopeConfig(theta=50000.0), HEAD_DIM, 600)[0][599], atol=1e-2)


def test_frequency_factors_are_a_constant_longrope():
    factors = tuple(1 + j / 7 for j in range(HEAD_DIM // 2))
    rope = RopeConfig(theta=50000.0, freq_factors=factors)
    written = rope.to_hf(256)
    assert RopeConfig.from_hf({"rope_parameters": written}, 256) == rope
    cos, sin = rope_tables(rope, HEAD_DIM, POSITIONS)
    expected_cos, expected_sin = theirs(llama_config(written), torch.arange(POSITIONS))
    assert torch.equal(cos, expected_cos)
    assert torch.equal(sin, expected_sin)


def test_frequency_factors_say_what_llama3_says():
    config = llama_config({"rope_type": "llama3", **LLAMA3})
    plain = ROPE_INIT_FUNCTIONS["linear"](llama_config({"rope_type": "linear", "factor": 1.0}))[0]
    factors = tuple((plain / ROPE_INIT_FUNCTIONS["llama3"](config)[0]).tolist())
    cos, _ = rope_tables(RopeConfig(theta=50000.0, freq_factors=factors), HEAD_DIM, POSITIONS)
    torch.testing.assert_close(cos, theirs(config, torch.arange(POSITIONS))[0], rtol=0, atol=1e-4)


def test_gguf_linear_and_yarn():
    fields = {"llama.rope.freq_base": 50000.0, "llama.context_length": 256, "llama.rope.dimension_count": HEAD_DIM}
    linear = {**fields, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    assert RopeConfig.from_gguf(linear, "llama", HEAD_DIM) == RopeConfig(kind="linear", theta=50000.0, factor=2.5)
    assert RopeConfig.from_gguf({**fields, "llama.rope.scale_linear": 2.5}, "llama", HEAD_DIM).factor == 2.5
    yarn = {**fields, "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    yarn["llama.rope.scaling.original_context_length"] = 64
    expected = theirs(llama_config({"rope_type": "yarn", **YARN}), torch.arange(POSITIONS))[0]
    assert torch.equal(rope_tables(RopeConfig.from_gguf(yarn, "llama", HEAD_DIM), HEAD_DIM, POSITIONS)[0], expected)
    scaled = RopeConfig.from_gguf({**yarn, "llama.rope.scaling.attn_factor": 0.5}, "llama", HEAD_DIM)
    torch.testing.assert_close(rope_tables(scaled, HEAD_DIM, POSITIONS)[0], expected * 0.5)
    assert RopeConfig.from_gguf(fields, "llama", HEAD_DIM) == RopeConfig(theta=50000.0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "mrope", "factor": 2.0}, "rope type 'mrope' is not supported; supported: default, linear"),
        ({"type": "su"}, "rope type 'su' is not supported"),
        ({"rope_type": "linear"}, "type 'linear': factor must be a positive number, found None"),
        ({"rope_type": "linear", "factor": "2"}, "factor must be a positive number, found '2'"),
        ({"rope_type": "dynamic", "factor": 0}, "factor must be a positive number, found 0"),
        ({"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}, "low_freq_factor must be a positive number"),
        ({"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor must exceed low_freq_factor"),
        ({"rope_type": "yarn", **YARN, "partial_rotary_factor": 1.5}, "partial_rotary_factor must be at most 1"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, "equal short_factor and long_factor"),
        ({"full_attention": {"rope_type": "default"}}, "per-layer RoPE is not supported"),
        ([2.0], "must be one flat object"),
    ],
)  # fmt: skip
def test_bad_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig.from_hf({"rope_scaling": parameters}, 256)


def test_bad_gguf_scaling_and_factor_count():
    with pytest.raises(ValueError, match=r"llama\.rope\.scaling\.type 'longrope' is not supported"):
        RopeConfig.from_gguf({"llama.rope.scaling.type": "longrope"}, "llama", HEAD_DIM)
    with pytest.raises(ValueError, match="a rotary width of 64 needs 32, found 3"):
        rope_tables(RopeConfig(freq_factors=(1.0, 1.0, 1.0)), HEAD_DIM, 4)
