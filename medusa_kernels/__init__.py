"""Medusa's ops: tree attention, draft heads, tree verification and K/V compaction, and the few a decoding step needs
beside them.
"""

from .compact_kv import compact_kv
from .draft_heads import draft_heads
from .linear import PackedLinear, linear, pack_linear
from .rms_norm import rms_norm
from .rotary_append import rotary_append
from .silu_mul import silu_mul
from .tree import Tree
from .tree_attention import tree_attention
from .verify_lm_head import verify_lm_head
from .verify_tree import verify_tree

__all__ = [
    "PackedLinear",
    "Tree",
    "compact_kv",
    "draft_heads",
    "linear",
    "pack_linear",
    "rms_norm",
    "rotary_append",
    "silu_mul",
    "tree_attention",
    "verify_lm_head",
    "verify_tree",
]
