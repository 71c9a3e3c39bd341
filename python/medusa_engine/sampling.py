"""How a request chooses its tokens: the options of `generate`, checked, one set per sequence."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch

from medusa_kernels.verify_tree import Acceptance, acceptance

DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


@dataclass(frozen=True)
class SamplingOptions:
    """One value for all sequences or one per sequence, as `Medusa.generate` takes them."""

    mode: str | Sequence[str] = "greedy"
    temperature: float | Sequence[float] = 1.0
    top_p: float | Sequence[float] = 1.0
    top_k: int | Sequence[int] = 0
    posterior_threshold: float | Sequence[float] = 0.09
    posterior_alpha: float | Sequence[float] = 0.3
    seed: int | Sequence[int] | None = None

    def acceptance(self, batch: int, device: torch.device) -> Acceptance | None:
        """As `verify_tree` takes them; None if every sequence is greedy.

        Raises:
            ValueError: a value is out of range, there is not one per sequence, or a greedy sequence has a temperature,
                top_p or top_k that greedy decoding would silently ignore.
        """
        result = acceptance(
            batch,
            device,
            mode=self.mode,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            posterior_threshold=self.posterior_threshold,
            posterior_alpha=self.posterior_alpha,
            seed=self._seeds(batch),
        )
        modes = [self.mode] * batch if isinstance(self.mode, str) else self.mode
        for name, default in DEFAULTS.items():
            value = getattr(self, name)
            values = value if isinstance(value, Sequence) else [value] * batch
            for mode, given in zip(modes, values, strict=True):
                if mode == "greedy" and given != default:
                    raise ValueError(f"{name}={given} has no effect with mode='greedy'; use mode='lossless' to sample")
        return result

    def _seeds(self, batch: int) -> torch.Tensor:
        seeds = self.seed if isinstance(self.seed, Sequence) else [self.seed] * batch
        if len(seeds) != batch:
            raise ValueError(f"seed must be one int or one per prompt ({batch}), not {len(seeds)}")
        for seed in seeds:
            if seed is not None and (
                isinstance(seed, bool) or not isinstance(seed, Integral) or not -(2**63) <= seed < 2**63
            ):
                raise ValueError(f"seed must be a 64-bit int, not {seed!r}")
        known = [secrets.randbits(63) if seed is None else seed for seed in seeds]
        return torch.tensor(known, dtype=torch.int64, device="cpu")
