"""What one program finds out about one row of logits: its argmax, and a draw from its truncated softmax. Every sum
has an order that depends on the vocabulary alone, so a row gives the same token whatever stands beside it.
"""

import triton
import triton.language as tl

from .keys import key_value, order_key

NO_TOKEN: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_ALL: tl.constexpr = tl.constexpr(-(2**31))  # as a cut: below every key
_NEARLY: tl.constexpr = tl.constexpr(1 - 2.0**-20)  # of top_p: a set short of it by rounding alone has reached it
_PROBES: tl.constexpr = tl.constexpr(8)  # thresholds tried per pass over the row: 2^32 keys take 11 passes


@triton.jit
def part(logits, first, vocab, BLOCK: tl.constexpr):
    """Tokens first .. first + BLOCK: their ids, fp32 logits (-inf past the vocabulary), and which are inside it."""
    token = first + tl.arange(0, BLOCK)
    inside = token < vocab
    return token, tl.load(logits + token, mask=inside, other=float("-inf")).to(tl.float32), inside


@triton.jit
def argmax(logits, vocab, BLOCK: tl.constexpr):
    """The lowest id of the largest logit, and that logit. NaN is the largest, as in PyTorch: so its rows have an id."""
    best_token, best, _ = part(logits, 0, vocab, BLOCK)
    for first in range(BLOCK, vocab, BLOCK):
        token, x, _ = part(logits, first, vocab, BLOCK)
        larger = (x > best) | ((x != x) & (best == best))
        best_token = tl.where(larger, token, best_token)
        best = tl.where(larger, x, best)
    nan = best != best
    top = tl.max(tl.where(nan, float("inf"), best), 0)
    any_nan = tl.max(nan.to(tl.int32), 0) > 0
    at_top = tl.where(any_nan, nan, best == top)
    return tl.min(tl.where(at_top, best_token, NO_TOKEN), 0), tl.where(any_nan, float("nan"), top)


@triton.jit
def philox_uniform(seed, counter):
    """A multiple of 2^-24 in [0, 1) from Philox4x32-10 (Salmon et al., 2011); both are 64-bit, low word first."""
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.full([], 0, tl.uint32)
    word, _, _, _ = tl.philox(seed, low, high, zero, zero)
    return (word >> 8).to(tl.float32) * (2.0**-24)


@triton.jit
def shifted(x, top, temperature):
    return x / temperature - top / temperature


@triton.jit
def threshold(logits, vocab, lowest, target, top, temperature, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The lowest key from `lowest` on above which there are fewer than `target` tokens, or less than that mass; and
    what there is above it.
    """
    low, high = lowest.to(tl.int64), order_key(top).to(tl.int64)
    above_high = target * 0.0
    while low < high:
        step = (high - low) // (_PROBES + 1) + 1
        probe = tl.minimum(low + (tl.arange(0, _PROBES).to(tl.int64) + 1) * step - 1, high)
        sums = tl.zeros([_PROBES, BLOCK], tl.float32)
        for first in range(0, vocab, BLOCK):
            _, x, inside = part(logits, first, vocab, BLOCK)
            key = order_key(x)
            measure = tl.exp(shifted(x, top, temperature)) if BY_MASS else tl.full([BLOCK], 1.0, tl.float32)
            measure = tl.where(inside & (key > low.to(tl.int32)) & (key <= high.to(tl.int32)), measure, 0.0)
            sums += tl.where(key[None, :] > probe.to(tl.int32)[:, None], measure[None, :], 0.0)
        above = above_high + tl.sum(sums, 1)
        # What lies above falls as probes rise: the lowest that qualifies is the new upper end.
        enough = above < target
        low = tl.max(tl.where(enough, low, probe + 1), 0)
        high = tl.min(tl.where(enough, probe, high), 0)
        above_high = tl.max(tl.where(enough, above, above_high), 0)
    return high.to(tl.int32), above_high


@triton.jit
def tie_weight(cut, top, temperature):
    """The weight of a token whose key is the cut."""
    return tl.where(cut == _ALL, 0.0, tl.exp(shifted(key_value(cut), top, temperature)))


@triton.jit
def kept_mass(logits, vocab, cut, ties, top, temperature, BLOCK: tl.constexpr):
    """The sum of the weights that `truncated` keeps."""
    mass = tl.zeros([BLOCK], tl.float32)
    equal = tl.zeros([BLOCK], tl.int32)
    for first in range(0, vocab, BLOCK):
        _, x, inside = part(logits, first, vocab, BLOCK)
        key = order_key(x)
        mass += tl.where(inside & (key > cut), tl.exp(shifted(x, top, temperature)), 0.0)
        equal += tl.where(inside & (key == cut), 1, 0)
    kept = tl.minimum(ties, tl.sum(equal, 0)).to(tl.float32)
    return tl.sum(mass, 0) + kept * tie_weight(cut, top, temperature)


@triton.jit
def truncated(logits, vocab, top_k, top_p, top, temperature, BLOCK: tl.constexpr):
    """top_k first (0 = off), then the smallest set whose share of what it left is at least top_p: the tokens with a key
    above the cut, and the first `ties` ids whose key it is.
    """
    cut = tl.full([], _ALL, tl.int32)
    ties = tl.full([], NO_TOKEN, tl.int32)
    if (top_k > 0) & (top_k < vocab):
        cut, above = threshold(logits, vocab, cut, top_k.to(tl.float32), top, temperature, False, BLOCK)
        ties = top_k - above.to(tl.int32)
    if top_p < 1.0:
        target = _NEARLY * top_p * kept_mass(logits, vocab, cut, ties, top, temperature, BLOCK)
        key, above = threshold(logits, vocab, cut, target, top, temperature, True, BLOCK)
        limit = tl.where(key == cut, ties, NO_TOKEN)
        weight = tie_weight(key, top, temperature)
        needed = tl.ceil((target - above) / tl.where(weight > 0.0, weight, 1.0))  # until the mass is reached
        fewer = (weight > 0.0) & (needed < limit.to(tl.float32))
        ties = tl.where(fewer, tl.where(fewer, needed, 0.0).to(tl.int32), limit)
        cut = key
    return cut, ties


@triton.jit
def draw(logits, vocab, cut, ties, u, top, temperature, BLOCK: tl.constexpr):
    """The first id whose running sum of kept weights exceeds u times their total, else the last of positive weight; -1
    where there is none, because a logit is NaN or infinite.
    """
    target = u * kept_mass(logits, vocab, cut, ties, top, temperature, BLOCK)
    equal_weight = tie_weight(cut, top, temperature)
    # Which part crosses, or is the last of positive weight; and where it starts.
    running, ties_before, first = target * 0.0, ties * 0, ties * 0
    at, at_running, at_ties = first, running, ties_before
    while (first < vocab) & (running <= target):
        _, x, inside = part(logits, first, vocab, BLOCK)
        key = order_key(x)
        mass = tl.sum(tl.where(inside & (key > cut), tl.exp(shifted(x, top, temperature)), 0.0), 0)
        equal = tl.sum(tl.where(inside & (key == cut), 1, 0), 0)
        mass += tl.maximum(tl.minimum(ties - ties_before, equal), 0).to(tl.float32) * equal_weight
        positive = mass > 0.0
        at = tl.where(positive, first, at)
        at_running = tl.where(positive, running, at_running)
        at_ties = tl.where(positive, ties_before, at_ties)
        running += mass
        ties_before += equal
        first += BLOCK
    token, x, inside = part(logits, at, vocab, BLOCK)
    key = order_key(x)
    tie = inside & (key == cut)
    rank = at_ties + tl.cumsum(tie.to(tl.int32), 0) - 1
    weight = tl.where(inside & (key > cut), tl.exp(shifted(x, top, temperature)), 0.0)
    weight = tl.where(tie & (rank < ties), equal_weight, weight)
    crossed = (at_running + tl.cumsum(weight, 0) > target) & (weight > 0.0)
    drawn = tl.min(tl.where(crossed, token, NO_TOKEN), 0)
    # Rounding may keep the walk within the part just under the target: then its last positive weight is meant.
    return tl.where(drawn == NO_TOKEN, tl.max(tl.where(weight > 0.0, token, -1), 0), drawn)
