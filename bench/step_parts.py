"""What a decoding step of SmolLM2's kind consists of: its ops, and the bytes and operations of each.

Bytes are those that come from memory, weights and K/V; what lies in the caches counts nothing. The limit of a part is
the larger of two times: of the bytes, at the read bandwidth, and of the operations, at the speed of an fp32 matrix
product, for int8 times what `INT8_SPEED` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medusa_engine.config import ModelConfig
from medusa_engine.heads import MedusaHeads
from medusa_kernels._backends import _C

DTYPES = ("float32", "bfloat16", "int8")
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
CACHE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 2}
# Times fp32. VNNI does four products in the place of one; AVX2 needs two multiplications for four, where FMA is one.
INT8_SPEED = {"avx512": 4, "avx2": 2, "portable": 1}
OF_WEIGHTS = ("linear", "draft_heads")  # the ops that int8 makes cheaper


@dataclass(frozen=True)
class Part:
    """All calls of one op and shape in a step. `dims` are bench.ops's; bytes and operations are those of one call."""

    name: str
    op: str
    dims: Mapping[str, int | str]
    calls: int
    bytes: int = 0
    operations: int = 0


@dataclass(frozen=True)
class Limits:
    """Bytes and operations per second, of fp32."""

    bandwidth: float
    speed: float

    def seconds(self, parts: Sequence[Part], dtype: str) -> float:
        """What these parts of a step take at the least."""
        size, _ = totals(parts)
        faster = INT8_SPEED[_C.cpu.isa()] if dtype == "int8" else 1
        computing = sum(p.operations * p.calls / (faster if p.op in OF_WEIGHTS else 1) for p in parts)
        return max(size / self.bandwidth, computing / self.speed)


def step_parts(c: ModelConfig, heads: MedusaHeads | None, dtype: str, *, nodes: int, context: int) -> list[Part]:
    """A step of one sequence, part by part; the heads run where there is more than the root."""
    d, layers, hidden = c.head_dim, c.num_layers, c.hidden_size
    attention = {"n": nodes, "heads": c.num_heads, "kv_heads": c.num_kv_heads, "head_dim": d, "prefix": context}
    kv_row = 2 * c.num_kv_heads * d * CACHE_BYTES[dtype]

    def linear(name: str, inputs: int, outputs: int, calls: int, rows: int = nodes) -> Part:
        size = _matrix_bytes(inputs, outputs, dtype)
        dims = {"rows": rows, "inputs": inputs, "outputs": outputs}
        return Part(name, "linear", dims, calls, size, 2 * rows * inputs * outputs)

    parts = [
        Part("norms", "rms_norm", {"rows": nodes, "hidden": hidden}, 2 * layers + 1),
        linear("q, k, v", hidden, (c.num_heads + 2 * c.num_kv_heads) * d, layers),
        Part("rotary, K/V append", "rotary_append", attention, layers),
        Part("attention", "tree_attention", attention, layers, kv_row * (context + nodes),
             4 * nodes * c.num_heads * d * (context + nodes)),
        linear("attention out", c.num_heads * d, hidden, layers),
        linear("gate, up", hidden, 2 * c.intermediate_size, layers),
        Part("SiLU x up", "silu_mul", {"rows": nodes, "ffn": c.intermediate_size}, layers),
        linear("down", c.intermediate_size, hidden, layers),
        linear("LM head", hidden, c.vocab_size, 1),
        Part("acceptance", "verify_tree", {"n": nodes, "vocab": c.vocab_size, "mode": "greedy"}, 1),
    ]  # fmt: skip
    if nodes == 1 or heads is None:
        return parts
    if heads.root_weight is not None:
        parts.append(linear("heads' root", hidden, hidden, 1, rows=1))
    vocab = heads.draft_vocab_size or c.vocab_size
    blocks = heads.num_heads * heads.num_layers
    own = heads.lm_head_weight is not None and heads.lm_head_weight.ndim == 3
    lm_heads = heads.num_heads if own else 1
    dims = {"heads": heads.num_heads, "layers": heads.num_layers, "hidden": hidden, "vocab": vocab, "top_k": 10}
    size = blocks * _matrix_bytes(hidden, hidden, dtype) + lm_heads * _matrix_bytes(hidden, vocab, dtype)
    products = hidden * (blocks * hidden + heads.num_heads * vocab)
    parts.append(Part("draft heads", "draft_heads", {**dims, "own": own}, 1, size, 2 * products))
    moved = {"layers": layers, "kv_heads": c.num_kv_heads, "head_dim": d, "moved": 1}
    parts.append(Part("compaction", "compact_kv", moved, 1))
    return parts


def _matrix_bytes(inputs: int, outputs: int, dtype: str) -> int:
    scales = 4 * outputs if dtype == "int8" else 0
    return inputs * outputs * WEIGHT_BYTES[dtype] + scales


def totals(parts: Sequence[Part]) -> tuple[int, int]:
    """Bytes and operations of a whole step."""
    return sum(p.bytes * p.calls for p in parts), sum(p.operations * p.calls for p in parts)
