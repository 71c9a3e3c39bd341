"""GGUF files: their metadata, and their tensors under Hugging Face names.

The header is parsed here rather than by `gguf.GGUFReader`, which takes seconds over a large vocabulary (it makes an
array of every string) and answers a truncated file with a stray exception. Dequantisation is the `gguf` package's.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ModelConfig
from .errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# The format's value types. 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FREQUENCY_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in the file. `shape` is in torch's order; `kind` is a GGMLQuantizationType."""

    shape: tuple[int, ...]
    kind: Any
    offset: int
    nbytes: int


class GgufFile:
    """A memory-mapped GGUF file.

    Attributes:
        path: the file.
        fields: its metadata as Python values; arrays are lists.
        tensors: its tensors by their names in the file.

    Raises:
        CheckpointError: for a file that is missing, truncated, not GGUF, or of an unknown version or tensor type.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise CheckpointError(f"{path}: cannot read the file ({error})") from None
        if self._data[:4] != _MAGIC:
            raise CheckpointError(f"{path}: not a GGUF file: it starts with {self._data[:4]!r}, not {_MAGIC!r}")
        self._at = 4
        try:
            self._parse()
        except (struct.error, EOFError):
            raise CheckpointError(f"{path}: the file is truncated; download it again") from None
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: damaged metadata, a string is not UTF-8 ({error.reason})") from None

    def _parse(self) -> None:
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise CheckpointError(
                f"{self.path}: GGUF version {version} is not supported; supported: 2 and 3, little-endian"
            )
        tensor_count, field_count = self._scalar("Q"), self._scalar("Q")
        self.fields: dict[str, Any] = {}
        for _ in range(field_count):
            key = self._string()
            self.fields[key] = self._value(self._scalar("I"))
        entries = [self._tensor_entry() for _ in range(tensor_count)]
        alignment = self.fields.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        self.tensors: dict[str, _Stored] = {}
        for name, shape, kind, offset in entries:
            self.tensors[name] = self._place(name, shape, kind, start + offset)

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        raw = self._data[self._at : self._at + length]
        if len(raw) != length:
            raise EOFError
        self._at += length
        return raw.decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, count = self._scalar("I"), self._scalar("Q")
            if count > len(self._data):  # a damaged count must not ask for its memory
                raise EOFError
            if item in _SCALARS:
                values = struct.unpack_from(f"<{count}{_SCALARS[item]}", self._data, self._at)
                self._at += struct.calcsize(f"<{count}{_SCALARS[item]}")
                return list(values)
            return [self._value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: damaged metadata, value type {kind} at byte {self._at} does not exist")
        return self._scalar(_SCALARS[kind])

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dims = self._scalar("I")
        shape = tuple(self._scalar("Q") for _ in range(dims))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _place(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> _Stored:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise CheckpointError(f"{self.path}: tensor {name!r} has the unknown quantisation type {number}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of shape {shape} does not divide into {kind.name} blocks"
            )
        nbytes = math.prod(shape) // block * block_bytes
        if offset + nbytes > len(self._data):
            raise CheckpointError(
                f"{self.path}: the file is truncated: tensor {name!r} ends at byte {offset + nbytes}, "
                f"the file at {len(self._data)}; download it again"
            )
        return _Stored(shape, kind, offset, nbytes)

    def read(self, name: str) -> Tensor:
        """A copy of the tensor: F32, F16 and BF16 as they are stored, every quantised type as fp32.

        Raises:
            CheckpointError: for a type the `gguf` package cannot dequantise.
        """
        import gguf.quants
        import numpy as np
        import torch

        stored = self.tensors[name]
        native = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(stored.kind.name)
        raw = np.frombuffer(self._data, np.uint8, stored.nbytes, stored.offset)
        if native is not None:
            return torch.from_numpy(raw.copy()).view(native).view(stored.shape)
        try:
            values = gguf.quants.dequantize(raw.reshape(*stored.shape[:-1], -1), stored.kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is stored as {stored.kind.name}, which is not supported; "
                "supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K and the gguf package's other quantised types"
            ) from None
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(stored.shape)


class GgufWeights:
    """A GGUF file's tensors as a Hugging Face checkpoint of the same model would hold them.

    Attributes:
        config: the model, from the file's metadata.
    """

    def __init__(self, file: GgufFile):
        self._file = file
        factors = None
        if _FREQUENCY_FACTORS in file.tensors:
            factors = tuple(file.read(_FREQUENCY_FACTORS).float().tolist())
        self.config = ModelConfig.from_gguf(file.fields, file.tensors.keys(), factors)
        # A name without a counterpart stays as it is, for the completeness check to list.
        self._stored = {_hf_name(name): name for name in file.tensors if name != _FREQUENCY_FACTORS}

    def names(self) -> frozenset[str]:
        return frozenset(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._stored[name]].shape

    def tensor(self, name: str) -> Tensor:
        tensor = self._file.read(self._stored[name])
        # llama.cpp's converter interleaves the rotated halves of q and k for the llama architecture alone.
        if self.config.architecture == "llama" and ".self_attn.q_proj." in name:
            return _split_halves(tensor, self.config.num_heads)
        if self.config.architecture == "llama" and ".self_attn.k_proj." in name:
            return _split_halves(tensor, self.config.num_kv_heads)
        return tensor


def _hf_name(name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    return _NAMES.get(name, name)


def _split_halves(tensor: Tensor, heads: int) -> Tensor:
    """Rows (heads, dim / 2, 2, ...) of neighbouring pairs -> (heads, 2, dim / 2, ...): first halves, then second."""
    pairs = tensor.view(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
