"""What a checkpoint's metadata says about its model, from config.json or from GGUF, in one set of names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from .rope import RopeConfig

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# What transformers assumes where config.json is silent; old Llama and Mistral checkpoints rely on it.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"max_position_embeddings": 131072, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768},
    "qwen3": {"max_position_embeddings": 32768, "head_dim": 128},
}


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder's shape and constants.

    Attributes:
        architecture: "llama", "mistral", "qwen2" or "qwen3".
        sliding_window: positions a query sees, if any layer limits them; None: all.
        qkv_bias, o_bias, mlp_bias: which projections have biases.
        qk_norm: whether each query and key head is RMS-normalised before RoPE (Qwen3).
        eos_token_ids: every id that ends a text, from config.json and generation_config.json.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key/value heads evenly; "
                "num_attention_heads must be a multiple of num_key_value_heads"
            )
        if self.head_dim % 2 or self.rope.rotary_dim(self.head_dim) % 2:
            raise ValueError(
                f"head_dim {self.head_dim} with {self.rope.rotary_dim(self.head_dim)} rotated dimensions: "
                "both must be even"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
        """Reads the objects in config.json and generation_config.json, as transformers 4 or 5 writes them.

        Raises:
            ValueError: for an unknown architecture, rope type or activation, a quantised checkpoint, and a key that is
                missing or malformed; the message names what was found and what is supported.
        """
        arch = config.get("model_type")
        if not isinstance(arch, str) or arch not in _CLASSES:
            raise ValueError(f"model_type {arch!r} is not supported; supported: {', '.join(_CLASSES)}")
        if quantised := config.get("quantization_config"):
            method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
            raise ValueError(
                f"weights quantised by {method!r} are not supported; use the unquantised model or a GGUF file"
            )
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ValueError(f"hidden_act {activation!r} is not supported; supported: silu")
        values = {**_DEFAULTS[arch], **config}

        def integer(key: str, default: int | None = None) -> int:
            value = values.get(key)
            value = default if value is None else value
            if value is None:
                raise ValueError(f"{key} is missing")
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{key} must be a positive integer, found {value!r}")
            return value

        hidden_size, num_heads = integer("hidden_size"), integer("num_attention_heads")
        if values.get("head_dim") is None and hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
        positions = integer("max_position_embeddings")
        eps = values.get("rms_norm_eps", 1e-6)
        if not isinstance(eps, float | int) or not 0 <= eps < 1:
            raise ValueError(f"rms_norm_eps must be a number in [0, 1), found {eps!r}")
        attention_bias = bool(values.get("attention_bias", False)) and arch in ("llama", "qwen3")
        generation = generation_config or {}

        def special(key: str) -> list[int]:
            named = [*_token_ids(config, key), *_token_ids(generation, key)]
            return named or ([] if key in config else _token_ids(_DEFAULTS[arch], key))

        eos, bos = special("eos_token_id"), special("bos_token_id")
        return cls(
            architecture=arch,
            vocab_size=integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=integer("intermediate_size"),
            num_layers=integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=integer("num_key_value_heads", num_heads),
            head_dim=integer("head_dim", hidden_size // num_heads),
            rms_norm_eps=float(eps),
            rope=RopeConfig.from_hf(values, positions),
            max_position_embeddings=positions,
            sliding_window=_sliding_window(values, arch, integer("num_hidden_layers")),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or arch == "qwen2",
            o_bias=attention_bias,
            mlp_bias=bool(values.get("mlp_bias", False)) and arch == "llama",
            qk_norm=arch == "qwen3",
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=tuple(dict.fromkeys(eos)),
        )

    @classmethod
    def from_gguf(
        cls,
        fields: Mapping[str, Any],
        tensor_names: Collection[str] = (),
        freq_factors: tuple[float, ...] | None = None,
    ) -> ModelConfig:
        """Reads GGUF metadata.

        Args:
            fields: the file's key-value pairs.
            tensor_names: the file's own tensor names (blk.0.attn_q.bias, ...): they alone say whether the model has
                biases and an LM head of its own.
            freq_factors: the values of the tensor rope_freqs.weight, if the file has it.

        Raises:
            ValueError: as `from_hf`.
        """
        arch = fields.get("general.architecture")
        if arch not in _CLASSES:
            raise ValueError(f"general.architecture {arch!r} is not supported; supported: {', '.join(_CLASSES)}")
        if fields.get(f"{arch}.expert_count"):
            raise ValueError(
                f"{arch}.expert_count is {fields[f'{arch}.expert_count']}: mixtures of experts are not supported"
            )

        def integer(key: str, default: int | None = None) -> int:
            value = fields.get(f"{arch}.{key}", default)
            if value is None:
                raise ValueError(f"{arch}.{key} is missing")
            if isinstance(value, list) and len(set(value)) == 1:
                value = value[0]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                shown = f"{value!r:.60}"
                raise ValueError(f"{arch}.{key} must be a positive integer, the same in every layer; found {shown}")
            return value

        hidden_size, num_heads = integer("embedding_length"), integer("attention.head_count")
        head_dim = integer("attention.key_length", hidden_size // num_heads)
        if integer("attention.value_length", head_dim) != head_dim:
            raise ValueError(f"{arch}.attention.value_length must equal key_length ({head_dim})")
        eps = fields.get(f"{arch}.attention.layer_norm_rms_epsilon")
        if eps is None:
            raise ValueError(f"{arch}.attention.layer_norm_rms_epsilon is missing")
        eos = [fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
        return cls(
            architecture=arch,
            vocab_size=integer("vocab_size", len(fields.get("tokenizer.ggml.tokens", ())) or None),
            hidden_size=hidden_size,
            intermediate_size=integer("feed_forward_length"),
            num_layers=integer("block_count"),
            num_heads=num_heads,
            num_kv_heads=integer("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            # The file keeps it as fp32; the shortest decimal of that is the number config.json had.
            rms_norm_eps=float(f"{eps:.7g}"),
            rope=RopeConfig.from_gguf(fields, arch, head_dim, freq_factors),
            max_position_embeddings=integer("context_length"),
            sliding_window=fields.get(f"{arch}.attention.sliding_window") or None,
            tie_word_embeddings="output.weight" not in tensor_names,
            qkv_bias=arch == "qwen2" or "blk.0.attn_q.bias" in tensor_names,
            o_bias="blk.0.attn_output.bias" in tensor_names,
            mlp_bias="blk.0.ffn_gate.bias" in tensor_names,
            qk_norm=arch == "qwen3",
            bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=tuple(dict.fromkeys(i for i in eos if i is not None)),
        )

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """A config.json that `from_hf`, transformers 5 and transformers 4 read back as this model.

        Raises:
            ValueError: where config.json cannot say it, such as query biases in a Llama without an output bias.
        """
        rope = self.rope.to_hf(self.max_position_embeddings)
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        eos = list(self.eos_token_ids)
        out: dict[str, Any] = {
            "architectures": [_CLASSES[self.architecture]],
            "model_type": self.architecture,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope.theta,
            "rope_scaling": None if rope["rope_type"] == "default" else scaling,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "torch_dtype": dtype,
        }
        if self.architecture in ("llama", "qwen3"):
            out["attention_bias"] = self.qkv_bias
        if self.architecture == "llama":
            out["mlp_bias"] = self.mlp_bias
        if self.architecture == "mistral":
            out["sliding_window"] = self.sliding_window
        if self.architecture in ("qwen2", "qwen3"):
            sliding = self.sliding_window is not None
            out |= {"use_sliding_window": sliding, "sliding_window": self.sliding_window}
            out["max_window_layers"] = 0 if sliding else self.num_layers
        if ModelConfig.from_hf(out) != self:
            raise ValueError(f"config.json of a {self.architecture} model cannot describe {self}")
        return out

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor such a checkpoint must hold, by its Hugging Face name."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        projections = [
            ("self_attn.q_proj", (q, hidden), self.qkv_bias),
            ("self_attn.k_proj", (kv, hidden), self.qkv_bias),
            ("self_attn.v_proj", (kv, hidden), self.qkv_bias),
            ("self_attn.o_proj", (hidden, q), self.o_bias),
            ("mlp.gate_proj", (inner, hidden), self.mlp_bias),
            ("mlp.up_proj", (inner, hidden), self.mlp_bias),
            ("mlp.down_proj", (hidden, inner), self.mlp_bias),
        ]
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            at = f"model.layers.{layer}"
            for name, shape, has_bias in projections:
                shapes[f"{at}.{name}.weight"] = shape
                if has_bias:
                    shapes[f"{at}.{name}.bias"] = shape[:1]
            shapes[f"{at}.input_layernorm.weight"] = (hidden,)
            shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
            if self.qk_norm:
                shapes[f"{at}.self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{at}.self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes


def _token_ids(config: Mapping[str, Any], key: str) -> list[int]:
    """An id, a list of ids or null, as a list."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ValueError(f"{key} must be an integer or a list of integers, found {value!r}")
    return ids


def _sliding_window(values: Mapping[str, Any], arch: str, num_layers: int) -> int | None:
    window = values.get("sliding_window")
    if window is None or arch == "llama":
        return None
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"sliding_window must be a positive integer or null, found {window!r}")
    if arch in ("qwen2", "qwen3"):
        # Qwen slides from layer max_window_layers on, and ships a window with use_sliding_window off.
        first = values.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int):
            raise ValueError(f"max_window_layers must be an integer, found {first!r}")
        none_slides = first >= num_layers
        if layer_types := values.get("layer_types"):
            none_slides = "sliding_attention" not in layer_types
        if not values.get("use_sliding_window", False) or none_slides:
            return None
    return window
