"""Models with the shapes of Vicuna-7B and Llama-3-8B and random weights, made on the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from medusa_engine.config import ModelConfig
from medusa_engine.heads import MedusaHeads
from medusa_engine.rope import RopeConfig

_LLAMA = {"architecture": "llama", "hidden_size": 4096, "num_layers": 32, "num_heads": 32, "head_dim": 128}
VICUNA_7B = ModelConfig(
    **_LLAMA, vocab_size=32000, intermediate_size=11008, num_kv_heads=32, rms_norm_eps=1e-5, rope=RopeConfig(),
    max_position_embeddings=4096,
)  # fmt: skip
LLAMA3_8B = ModelConfig(
    **_LLAMA, vocab_size=128256, intermediate_size=14336, num_kv_heads=8, rms_norm_eps=1e-5,
    rope=RopeConfig(theta=500000.0), max_position_embeddings=8192,
)  # fmt: skip
GEOMETRIES = {"vicuna-7b": VICUNA_7B, "llama-3-8b": LLAMA3_8B}
NUM_HEADS = 5


@dataclass
class RandomCheckpoint:
    """Stands where `Model` expects a checkpoint. Every weight is drawn when it is asked for; norms are 1."""

    config: ModelConfig
    device: str
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(0)

    @property
    def lm_head_name(self) -> str:
        return "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"

    def check_complete(self) -> None:
        """Nothing can be missing."""

    def tensor(self, name: str) -> Tensor:
        shape = shape_of(self.config, name)
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=self.device)
        return self.normal(*shape)

    def normal(self, *shape: int) -> Tensor:
        """bf16, of variance 1 / in_features: activations keep their size."""
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        return drawn.normal_(std=shape[-1] ** -0.5, generator=self.generator)


def shape_of(c: ModelConfig, name: str) -> tuple[int, ...]:
    """The shape of a Llama checkpoint's tensor."""
    part = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if "norm" in part:
        return (c.hidden_size,)
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return {
        "embed_tokens": (c.vocab_size, c.hidden_size),
        "lm_head": (c.vocab_size, c.hidden_size),
        "q_proj": (q, c.hidden_size),
        "k_proj": (kv, c.hidden_size),
        "v_proj": (kv, c.hidden_size),
        "o_proj": (c.hidden_size, q),
        "gate_proj": (c.intermediate_size, c.hidden_size),
        "up_proj": (c.intermediate_size, c.hidden_size),
        "down_proj": (c.hidden_size, c.intermediate_size),
    }[part]


def random_heads(checkpoint: RandomCheckpoint, *, own_lm_heads: bool) -> MedusaHeads:
    """Five heads of one layer, with the base's LM head or one each."""
    c = checkpoint.config
    own = checkpoint.normal(NUM_HEADS, c.vocab_size, c.hidden_size) if own_lm_heads else None
    return MedusaHeads(checkpoint.normal(NUM_HEADS, 1, c.hidden_size, c.hidden_size), lm_head_weight=own)


def linears(c: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of a step's matrices, stacked as the engine stacks them."""
    qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    return {
        "qkv": (qkv, c.hidden_size),
        "o": (c.hidden_size, c.num_heads * c.head_dim),
        "gate-up": (2 * c.intermediate_size, c.hidden_size),
        "down": (c.hidden_size, c.intermediate_size),
        "lm-head": (c.vocab_size, c.hidden_size),
    }


def weight_bytes(c: ModelConfig) -> int:
    """What one step must read of a bf16 model."""
    sizes = {name: 2 * rows * columns for name, (rows, columns) in linears(c).items()}
    return sizes.pop("lm-head") + c.num_layers * sum(sizes.values())


def kv_bytes(c: ModelConfig, rows: int) -> int:
    """bf16 K/V of `rows` tokens, all layers."""
    return 2 * 2 * c.num_layers * c.num_kv_heads * c.head_dim * rows


def heads_bytes(c: ModelConfig, *, own_lm_heads: bool) -> int:
    """What drafting must read in bf16: the heads' blocks, and the base's LM head once or one of each head's own."""
    lm_heads = NUM_HEADS if own_lm_heads else 1
    return 2 * c.hidden_size * (NUM_HEADS * c.hidden_size + lm_heads * c.vocab_size)
