"""Rotary position embeddings: what a checkpoint says about them, and the cos/sin tables the kernels read.

The frequency formulas are those of transformers' `ROPE_INIT_FUNCTIONS`, in the same order of fp32 operations, so that
the tables agree with it to the bit or to the last one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """How positions turn into angles.

    Attributes:
        kind: one of `ROPE_KINDS`.
        theta: the base of the wavelengths.
        partial_rotary_factor: the part of each head that is rotated, from its first dimension on.
        factor: context extension (linear, dynamic, llama3, yarn).
        max_position_embeddings: positions beyond which dynamic scaling begins; 0 where the kind does not need it.
        original_max_position_embeddings: context length before extension (llama3, yarn).
        low_freq_factor, high_freq_factor: llama3's band between untouched and fully scaled frequencies.
        beta_fast, beta_slow, truncate: yarn's correction range, in rotations, and whether it is rounded outwards.
        attention_factor, mscale, mscale_all_dim: yarn's scale of cos and sin; None: derived from `factor`.
        freq_factors: divisors of the frequencies, one per rotated pair, as GGUF's rope_freqs.weight holds them.
    """

    kind: str = "default"
    theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    max_position_embeddings: int = 0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    freq_factors: tuple[float, ...] | None = None

    def rotary_dim(self, head_dim: int) -> int:
        """How many of a head's `head_dim` dimensions are rotated."""
        return int(head_dim * self.partial_rotary_factor)

    def reach(self, context: int) -> float:
        """Positions that a model of this `context` is made for, extension included; dynamic scaling has no end."""
        if self.kind == "dynamic":
            return math.inf
        if self.kind == "linear":
            return int(context * self.factor)
        return max(context, int(self.original_max_position_embeddings * self.factor))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
        """Reads config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4).

        Raises:
            ValueError: for an unknown kind, a missing or malformed parameter; it names the kind and the key.
        """
        # transformers lets rope_scaling win where both are present.
        found = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(found, Mapping) or any(isinstance(value, Mapping) for value in found.values()):
            raise ValueError(
                f"rope parameters must be one flat object, found {found!r}; per-layer RoPE is not supported"
            )
        kind = found.get("rope_type", found.get("type", "default"))
        where = f"rope parameters of type {kind!r}"

        def number(
            key: str,
            default: float | None = None,
            *,
            required: bool = False,
            zero: bool = False,
            of: Mapping[str, Any] = found,
        ) -> Any:
            value = of.get(key)
            value = default if value is None else value
            if value is None and not required:
                return None
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or value < 0 or (value == 0 and not zero):
                raise ValueError(f"{where}: {key} must be a positive number, found {value!r}")
            return value

        theta = float(number("rope_theta", config.get("rope_theta") or 10000.0))
        partial = float(number("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0))
        if partial > 1:
            raise ValueError(f"{where}: partial_rotary_factor must be at most 1, found {partial!r}")
        base = {"theta": theta, "partial_rotary_factor": partial}
        if kind == "default":
            return cls(**base)
        if kind == "longrope":
            return cls(**base, freq_factors=_constant_longrope(found))
        if kind not in ROPE_KINDS:
            raise ValueError(f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
        original = number("original_max_position_embeddings", max_position_embeddings)
        original = number("original_max_position_embeddings", original, of=config)
        if kind == "yarn":
            return cls(
                kind="yarn",
                **base,
                factor=number("factor", max_position_embeddings / original),
                original_max_position_embeddings=original,
                beta_fast=number("beta_fast") or 32,
                beta_slow=number("beta_slow") or 1,
                truncate=bool(found.get("truncate", True)),
                attention_factor=number("attention_factor", zero=True),
                mscale=number("mscale", zero=True),
                mscale_all_dim=number("mscale_all_dim", zero=True),
            )
        factor = number("factor", required=True)
        if kind == "linear":
            return cls(kind="linear", **base, factor=factor)
        if kind == "dynamic":
            return cls(kind="dynamic", **base, factor=factor, max_position_embeddings=max_position_embeddings)
        low, high = number("low_freq_factor", required=True), number("high_freq_factor", required=True)
        if high <= low:
            raise ValueError(f"{where}: high_freq_factor must exceed low_freq_factor, found {high!r} and {low!r}")
        return cls(
            kind="llama3",
            **base,
            factor=factor,
            original_max_position_embeddings=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )

    def to_hf(self, max_position_embeddings: int) -> dict[str, Any]:
        """The `rope_parameters` object of config.json that `from_hf` and transformers read back."""
        out: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.partial_rotary_factor != 1.0:
            out["partial_rotary_factor"] = self.partial_rotary_factor
        if self.freq_factors is not None:
            # LongRoPE with equal factors at every length and no attention scale is exactly these divisors.
            factors = list(self.freq_factors)
            return {
                **out,
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "factor": 1.0,
                "attention_factor": 1.0,
                "original_max_position_embeddings": max_position_embeddings,
            }
        if self.kind != "default":
            out["factor"] = self.factor
        if self.kind in ("llama3", "yarn"):
            out["original_max_position_embeddings"] = self.original_max_position_embeddings
        if self.kind == "llama3":
            out |= {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
        if self.kind == "yarn":
            out |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow, "truncate": self.truncate}
            optional = ("attention_factor", "mscale", "mscale_all_dim")
            out |= {key: getattr(self, key) for key in optional if getattr(self, key) is not None}
        return out

    @classmethod
    def from_gguf(
        cls, fields: Mapping[str, Any], arch: str, head_dim: int, freq_factors: tuple[float, ...] | None = None
    ) -> RopeConfig:
        """Reads GGUF metadata `{arch}.rope.*`; `freq_factors` are the values of the tensor rope_freqs.weight."""

        def field(key: str, default: Any = None) -> Any:
            return fields.get(f"{arch}.rope.{key}", default)

        base = {
            "theta": float(field("freq_base", 10000.0)),
            "partial_rotary_factor": field("dimension_count", head_dim) / head_dim,
            "freq_factors": freq_factors,
        }
        # Files older than rope.scaling.* wrote a linear factor as rope.scale_linear.
        legacy = field("scale_linear", 1.0)
        kind = field("scaling.type", "linear" if legacy != 1.0 else "none")
        factor = float(field("scaling.factor", legacy)) or 1.0
        if kind == "none" or (kind == "linear" and factor == 1.0):
            return cls(**base)
        if kind == "linear":
            return cls(kind="linear", **base, factor=factor)
        if kind != "yarn":
            raise ValueError(f"{arch}.rope.scaling.type {kind!r} is not supported; supported: none, linear, yarn")
        original = field("scaling.original_context_length", fields.get(f"{arch}.context_length"))
        # llama.cpp multiplies its own 0.1 ln(factor) + 1 by this key, where Hugging Face replaces the whole scale.
        scale = field("scaling.yarn_attn_factor", field("scaling.attn_factor"))
        return cls(
            kind="yarn",
            **base,
            factor=factor,
            original_max_position_embeddings=original,
            beta_fast=field("scaling.yarn_beta_fast", 32.0),
            beta_slow=field("scaling.yarn_beta_slow", 1.0),
            attention_factor=None if scale is None else scale * _yarn_mscale(factor),
        )


def rope_tables(
    rope: RopeConfig, head_dim: int, num_positions: int, *, seqlen: int | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, times the attention factor.

    Args:
        rope: the checkpoint's RoPE.
        head_dim: dimensions of one attention head.
        num_positions: rows wanted; row p belongs to position p.
        seqlen: matters for the dynamic kind alone. None: row p uses the frequencies of length p + 1 (decoding).
            L: every row uses those of length L (the prefill of a prompt of L tokens).

    Returns:
        Two fp32 CPU tensors (num_positions, rotary_dim / 2). Column j turns dimensions j and j + rotary_dim / 2 of a
        head (the half-rotation layout of Hugging Face checkpoints).
    """
    import torch

    dim = rope.rotary_dim(head_dim)
    if rope.freq_factors is not None and len(rope.freq_factors) != dim // 2:
        found = len(rope.freq_factors)
        raise ValueError(f"rope frequency factors: a rotary width of {dim} needs {dim // 2}, found {found}")
    with torch.device("cpu"):
        if rope.kind == "dynamic":
            lengths = range(1, num_positions + 1) if seqlen is None else (seqlen,)
            bases = [_dynamic_theta(rope, dim, n) for n in lengths]
            theta: Any = torch.tensor(bases, dtype=torch.float32).unsqueeze(1)
        else:
            theta = rope.theta
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        frequencies, attention_factor = _scale(rope, theta**exponents, dim)
        angles = torch.arange(num_positions).float().unsqueeze(1) * frequencies
        return angles.cos() * attention_factor, angles.sin() * attention_factor


def _scale(rope: RopeConfig, wavelengths: Tensor, dim: int) -> tuple[Tensor, float]:
    """Frequencies (..., dim / 2) from the wavelengths theta ** (2 j / dim), and the scale of cos and sin."""
    import torch

    if rope.freq_factors is not None:
        wavelengths = torch.tensor(rope.freq_factors, dtype=torch.float32) * wavelengths
    frequencies = 1.0 / wavelengths
    if rope.kind == "linear":
        return frequencies / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, frequencies), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, wavelengths, dim)
    return frequencies, 1.0


def _dynamic_theta(rope: RopeConfig, dim: int, length: int) -> float:
    """NTK-aware theta for a sequence of `length` tokens; the model's own up to max_position_embeddings."""
    longest = rope.max_position_embeddings
    stretch = (rope.factor * max(length, longest) / longest) - (rope.factor - 1)
    return rope.theta * stretch ** (dim / (dim - 2))


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Long wavelengths divided by the factor, short ones kept, a linear blend between (Llama 3.1)."""
    import torch

    low, high, context = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > context / low, frequencies / rope.factor, frequencies)
    smooth = (context / wavelengths - low) / (high - low)
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = (wavelengths >= context / high) & (wavelengths <= context / low)
    return torch.where(between, blended, scaled)


def _yarn(rope: RopeConfig, wavelengths: Tensor, dim: int) -> tuple[Tensor, float]:
    """Interpolated and untouched frequencies blended over the correction range (YaRN, arXiv 2309.00071)."""
    import torch

    def correction_dim(rotations: float) -> float:
        context = rope.original_max_position_embeddings
        return (dim * math.log(context / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # keeps the ramp finite
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    untouched = 1 - ramp
    frequencies = (1.0 / (rope.factor * wavelengths)) * (1 - untouched) + (1.0 / wavelengths) * untouched

    if rope.attention_factor is not None:
        return frequencies, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return frequencies, _yarn_mscale(rope.factor, rope.mscale) / _yarn_mscale(rope.factor, rope.mscale_all_dim)
    return frequencies, _yarn_mscale(rope.factor)


def _yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _constant_longrope(found: Mapping[str, Any]) -> tuple[float, ...]:
    """The divisors of a LongRoPE that is the same at every length, which `to_hf` writes; any other is refused."""
    short, long = found.get("short_factor"), found.get("long_factor")
    if not isinstance(short, list) or short != long or found.get("attention_factor") != 1.0:
        raise ValueError(
            "rope type 'longrope' is supported with equal short_factor and long_factor and an attention_factor of 1.0 "
            f"alone; supported: {', '.join(ROPE_KINDS)}"
        )
    return tuple(float(value) for value in short)
