"""Model configurations against transformers': read, written, and turned into tensor shapes."""

import dataclasses

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_engine.config import ModelConfig

FAMILIES = {
    "llama": {},
    "llama-tied-biased": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama-wide-heads": {"head_dim": 32, "num_key_value_heads": 1},
    "mistral": {"sliding_window": 32, "rms_norm_eps": 1e-5},
    "mistral-full": {"sliding_window": None},
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "qwen3-biased": {"head_dim": 16, "attention_bias": True},
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_reads_what_transformers_writes_and_back(name, tiny, tmp_path):
    model = tiny(name.split("-")[0], **FAMILIES[name])
    model.config.save_pretrained(tmp_path)
    config = ModelConfig.from_hf(AutoConfig.from_pretrained(tmp_path).to_dict())
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert config.tensor_shapes() == expected
    assert config.architecture == name.split("-")[0]
    assert config.rms_norm_eps == model.config.rms_norm_eps
    assert config.sliding_window == model.config.to_dict().get("sliding_window")

    written = config.to_hf()
    assert ModelConfig.from_hf(written) == config
    theirs = AutoConfig.for_model(**written)
    again = AutoModelForCausalLM.from_config(theirs)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    for key in ("rms_norm_eps", "rope_parameters", "max_position_embeddings", "eos_token_id", "bos_token_id"):
        assert getattr(theirs, key) == getattr(model.config, key), key
    assert str(theirs.dtype) == "torch.bfloat16"


def test_old_config_without_optional_keys():
    # The keys of the first Llama and Vicuna checkpoints.
    config = ModelConfig.from_hf(
        {**LLAMA, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    )
    assert (config.num_kv_heads, config.head_dim, config.max_position_embeddings) == (32, 128, 2048)
    assert (config.rope.kind, config.rope.theta) == ("default", 10000.0)
    assert not config.tie_word_embeddings
    assert config.sliding_window is None


def test_end_of_text_ids_are_merged():
    generation = {"eos_token_id": [128001, 128008, 128009], "bos_token_id": 128000}
    config = ModelConfig.from_hf({**LLAMA, "eos_token_id": 128009, "bos_token_id": None}, generation)
    assert config.eos_token_ids == (128009, 128001, 128008)
    assert config.bos_token_id == 128000
    assert ModelConfig.from_hf({**LLAMA, "eos_token_id": None}).eos_token_ids == ()
    silent = {key: value for key, value in LLAMA.items() if key != "eos_token_id"}
    assert ModelConfig.from_hf(silent).eos_token_ids == (2,)
    assert ModelConfig.from_hf(silent, {"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert ModelConfig.from_hf(config.to_hf()).eos_token_ids == config.eos_token_ids


@pytest.mark.parametrize(
    ("keys", "window"),
    [
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 1024}, 1024),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 1024}, None),
        ({"model_type": "qwen2", "sliding_window": 1024}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 28}, 1024),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 32}, None),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"] * 32}, None),
        ({"model_type": "llama", "sliding_window": 1024}, None),
    ],
)
def test_sliding_window_is_what_some_layer_of_transformers_uses(keys, window):
    merged = {**LLAMA, "num_key_value_heads": 8, "sliding_window": 4096, **keys}
    if keys == {"model_type": "mistral"}:
        del merged["sliding_window"]
    assert ModelConfig.from_hf(merged).sliding_window == window
    theirs = AutoConfig.for_model(**merged)
    if keys["model_type"].startswith("qwen"):
        assert ("sliding_attention" in theirs.layer_types) == (window is not None)
    if keys["model_type"] == "mistral":
        assert theirs.sliding_window == window


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma' is not supported; supported: llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": None},
            "max_window_layers must be an integer, found None",
        ),
        (
            {"original_max_position_embeddings": "32", "rope_scaling": {"type": "yarn", "factor": 2.0}},
            "original_max_position_embeddings must be a positive number, found '32'",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq' are not supported"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers must be a positive integer, found '32'"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, found 0"),
        ({"num_key_value_heads": 5}, "32 attention heads cannot share 5 key/value heads evenly"),
        ({"hidden_size": 4100}, "hidden_size 4100 is not a multiple of num_attention_heads 32"),
        ({"head_dim": 33}, "head_dim 33 with 33 rotated dimensions: both must be even"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be an integer or a list of integers, found '</s>'"),
        (
            {"model_type": "mistral", "sliding_window": -1},
            "sliding_window must be a positive integer or null, found -1",
        ),
        ({"rope_scaling": {"type": "mrope"}}, "rope type 'mrope' is not supported"),
    ],
)
def test_bad_config(keys, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**LLAMA, **keys})


GGUF = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": [2, 2],
    "llama.feed_forward_length": 96,
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "tokenizer.ggml.tokens": ["a"] * 96,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 5,
}


def test_gguf_fields():
    config = ModelConfig.from_gguf(GGUF, {"output.weight"})
    assert (config.vocab_size, config.num_kv_heads, config.head_dim, config.eos_token_ids) == (96, 2, 16, (2, 5))
    assert config.rms_norm_eps == 1e-5
    assert not config.tie_word_embeddings
    assert ModelConfig.from_gguf(GGUF).tie_word_embeddings
    biased = ModelConfig.from_gguf(GGUF, {"blk.0.attn_q.bias", "blk.0.attn_output.bias", "blk.0.ffn_gate.bias"})
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.architecture": "phi3"}, "general.architecture 'phi3' is not supported; supported: llama"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8: mixtures of experts are not supported"),
        ({"llama.block_count": None}, r"llama\.block_count is missing"),
        ({"llama.attention.head_count_kv": [2, 4]}, "the same in every layer; found"),
        ({"llama.attention.value_length": 8}, "value_length must equal key_length"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
    ],
)
def test_bad_gguf_fields(keys, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_gguf({**GGUF, **keys})


def test_config_that_hugging_face_cannot_express():
    config = dataclasses.replace(ModelConfig.from_gguf(GGUF), qkv_bias=True)
    with pytest.raises(ValueError, match=r"config\.json of a llama model cannot describe"):
        config.to_hf()
