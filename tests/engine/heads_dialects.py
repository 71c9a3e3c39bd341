"""Random heads, and how each dialect names their tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from medusa_engine.heads import MedusaHeads

HIDDEN, VOCAB = 6, 11
Tensors = dict[str, Tensor]


def random_heads(
    num_heads: int = 3,
    num_layers: int = 2,
    *,
    hidden: int = HIDDEN,
    bias: bool = True,
    own_lm: bool = False,
    shared_lm: bool = False,
    draft_vocab: int | None = None,
    root: bool = False,
    dtype: torch.dtype = torch.float32,
) -> MedusaHeads:
    generator = torch.Generator().manual_seed(num_heads * 100 + num_layers)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rows = draft_vocab or VOCAB
    lm_head = random(num_heads, rows, hidden) if own_lm else random(rows, hidden) if shared_lm else None
    return MedusaHeads(
        random(num_heads, num_layers, hidden, hidden),
        random(num_heads, num_layers, hidden) if bias else None,
        lm_head,
        torch.randperm(VOCAB, generator=generator)[:draft_vocab].int() if draft_vocab else None,
        random(hidden, hidden) if root else None,
    )


def named(heads: MedusaHeads, block: str, lm_head: str = "", shared: str = "lm_head.weight") -> Tensors:
    """The heads' tensors under a dialect's names, each with storage of its own."""
    tensors: Tensors = {}
    for h in range(heads.num_heads):
        for layer in range(heads.num_layers):
            tensors[block.format(h=h, l=layer) + ".weight"] = heads.block_weight[h, layer].clone()
            if heads.block_bias is not None:
                tensors[block.format(h=h, l=layer) + ".bias"] = heads.block_bias[h, layer].clone()
        if heads.lm_head_weight is not None and heads.lm_head_weight.ndim == 3:
            tensors[lm_head.format(h=h, l=heads.num_layers) + ".weight"] = heads.lm_head_weight[h].clone()
    if heads.lm_head_weight is not None and heads.lm_head_weight.ndim == 2:
        tensors[shared] = heads.lm_head_weight.clone()
    if heads.token_map is not None:
        tensors["token_map"] = heads.token_map.long()
    if heads.root_weight is not None:
        tensors["root.weight"] = heads.root_weight
    return tensors


def medusa(heads: MedusaHeads, prefix: str = "") -> Tensors:
    return named(heads, prefix + "{h}.{l}.linear", prefix + "{h}.{l}")


def tensorrt(heads: MedusaHeads) -> Tensors:
    return named(heads, "medusa_heads.{h}.medusa_layers.{l}.linear", "medusa_heads.{h}.lm_head")


def vllm(heads: MedusaHeads, prefix: str = "") -> Tensors:
    tensors = named(heads, "blocks.{h}.layers.{l}", "lm_heads.{h}")
    return {prefix + name: tensor for name, tensor in tensors.items()}


def base_model() -> Tensors:
    return {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN),
        "model.layers.0.mlp.up_proj.weight": torch.randn(9, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": torch.randn(VOCAB, HIDDEN),
    }


def write(folder: Path, tensors: Tensors, config: dict | None = None, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same(loaded: MedusaHeads, wanted: MedusaHeads) -> None:
    for name in ("block_weight", "block_bias", "lm_head_weight", "token_map", "root_weight"):
        found, expected = getattr(loaded, name), getattr(wanted, name)
        assert (found is None) == (expected is None), name
        if expected is not None:
            assert found.dtype == expected.dtype, name
            assert torch.equal(found, expected), name
