"""SmolLM2 as GGUF files of several precisions, for peers that read nothing else; made once, kept in the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from medusa_engine.checkpoint import Checkpoint, open_checkpoint
from medusa_engine.default_model import cache_root
from medusa_engine.files import replacing

if TYPE_CHECKING:
    import gguf
    from torch import Tensor

# Storage of the layers' matrices and of the embedding, which is also the LM head. llama.cpp's own quantiser keeps the
# latter at 8 bits in a 4-bit file, and so does the file that the default model is published as.
PRECISIONS = {
    "BF16": ("BF16", "BF16"),
    "F16": ("F16", "F16"),
    "Q8_0": ("Q8_0", "Q8_0"),
    "Q4_1": ("Q4_1", "Q8_0"),
}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # GGUF's token types


def exported(folder: Path, precision: str) -> Path:
    """The GGUF file of the model in `folder`, from the cache unless the model is newer than it."""
    target = cache_root() / "gguf" / f"{folder.name}.{precision}.gguf"
    if not target.exists() or target.stat().st_mtime < (folder / "model.safetensors").stat().st_mtime:
        export(folder, precision, target)
    return target


def export(folder: Path, precision: str, target: Path) -> None:
    """Writes `target` in one step: whatever interrupts it, there is a whole file or none.

    Args:
        folder: a Hugging Face checkpoint of a llama model with SmolLM2's kind of tokenizer (byte-level BPE).
        precision: one of PRECISIONS.

    Raises:
        ValueError: another architecture or precision.
    """
    import gguf

    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    checkpoint = open_checkpoint(folder)
    if checkpoint.config.architecture != "llama":
        raise ValueError(f"only llama models are exported, not {checkpoint.config.architecture!r}")
    with replacing(target) as partial:
        writer = gguf.GGUFWriter(partial, "llama")
        _add_config(writer, checkpoint, precision)
        _add_tokenizer(writer, folder, checkpoint)
        _add_tensors(writer, checkpoint, precision)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add_config(writer: gguf.GGUFWriter, checkpoint: Checkpoint, precision: str) -> None:
    import gguf

    c = checkpoint.config
    writer.add_name(checkpoint.path.name)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope.theta)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{precision}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, checkpoint: Checkpoint) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = spec["model"]
    vocabulary = dict(model["vocab"])
    kinds = dict.fromkeys(vocabulary, _NORMAL)
    for added in spec["added_tokens"]:
        vocabulary[added["content"]] = added["id"]
        kinds[added["content"]] = _CONTROL if added["special"] else _USER_DEFINED
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[token] for token in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_add_bos_token(False)
    tokenizer = checkpoint.tokenizer
    for add, token in (
        (writer.add_bos_token_id, "bos_token"),
        (writer.add_eos_token_id, "eos_token"),
        (writer.add_unk_token_id, "unk_token"),
        (writer.add_pad_token_id, "pad_token"),
    ):
        if (spelled := tokenizer.special_tokens.get(token)) in vocabulary:
            add(vocabulary[spelled])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _add_tensors(writer: gguf.GGUFWriter, checkpoint: Checkpoint, precision: str) -> None:
    import gguf
    import gguf.quants

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, checkpoint.config.num_layers)
    matrix, embedding = PRECISIONS[precision]
    for name in sorted(checkpoint.names()):
        tensor = _interleaved(checkpoint, name)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        kind = "F32" if tensor.dim() == 1 else embedding if target == "token_embd.weight" else matrix
        stored = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(target, gguf.quants.quantize(tensor.float().numpy(), stored), raw_dtype=stored)


def _interleaved(checkpoint: Checkpoint, name: str) -> Tensor:
    """The tensor; q's and k's rows with the rotated halves as neighbouring pairs, as llama.cpp rotates them."""
    tensor, c = checkpoint.tensor(name), checkpoint.config
    heads = c.num_heads if ".q_proj." in name else c.num_kv_heads if ".k_proj." in name else None
    if heads is None:
        return tensor
    halves = tensor.view(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
