"""The one definition of a seeded draw: Philox4x32-10 (Salmon et al., 2011) and the inverse CDF over ascending token
ids.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
# Of top_p: 0.4 + 0.3 + 0.2 reach 0.9, in whatever order and precision a backend adds them up.
NEARLY = 1 - 2.0**-20


def philox_uniform(key: int, counter: int) -> float:
    """A multiple of 2**-24 in [0, 1): the top 24 bits of the first output word.

    key and counter are 64-bit integers, low word first; the counter's upper two words are zero.
    """
    words = [counter & _WORD, (counter >> 32) & _WORD, 0, 0]
    keys = [key & _WORD, (key >> 32) & _WORD]
    for _ in range(10):
        first, second = _MULTIPLIERS[0] * words[0], _MULTIPLIERS[1] * words[2]
        words = [(second >> 32) ^ words[1] ^ keys[0], second & _WORD, (first >> 32) ^ words[3] ^ keys[1], first & _WORD]
        keys = [(k + step) & _WORD for k, step in zip(keys, _KEY_STEPS, strict=True)]
    return (words[0] >> 8) * 2.0**-24


def kept_weights(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """exp(logits / temperature - max) of the tokens that survive top_k, then top_p; 0 elsewhere. fp32, (vocab,).

    top_p keeps the smallest set, by falling probability and then rising id, whose share of what top_k left is >= top_p,
    or short of it by no more than rounding: by less than NEARLY leaves.
    """
    scaled = logits.float() / temperature
    weights = torch.exp(scaled - scaled.max())
    order = torch.sort(logits, descending=True, stable=True).indices
    if top_k:
        weights[order[top_k:]] = 0
    if top_p < 1:
        mass = weights[order].cumsum(dim=0)
        before = mass - weights[order]
        weights[order[before >= NEARLY * top_p * weights.sum()]] = 0
    return weights


def draw(weights: Tensor, seed: int, counter: int) -> int:
    """The first token id whose running sum of weights exceeds u times their total, else the last one of positive
    weight.
    """
    running = weights.cumsum(dim=0)
    above = running > philox_uniform(seed, counter) * running[-1]
    above[weights.nonzero()[-1]] = True  # u just under 1 may round up to the total
    return int(above.int().argmax())
