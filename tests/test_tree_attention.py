"""tree_attention: every backend against a dense float64 mask, rows it must not read poisoned."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from medusa_kernels import Tree

from . import cases, oracles
from .backends import every_backend, matrix
from .cases import BF16, F16, F32, SHORT
from .tolerances import assert_close

OP = "tree_attention"


@dataclass(frozen=True)
class Case:
    n: int = 9
    kind: str = "random"
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    prefix: int = 37
    dtype: torch.dtype = F32
    kv_dtype: torch.dtype | None = None
    layout: str = "dense"
    own_masks: bool = False
    scale: float | None = None
    spread: float = 1.0  # of the queries: large makes the softmax almost one-hot

    @property
    def mixed(self) -> bool:
        return self.kv_dtype not in (None, self.dtype)

    @property
    def work(self) -> int:
        return self.batch * self.heads * self.n * (self.prefix + self.n) * self.head_dim

    def __str__(self) -> str:
        cache = f"-over-{SHORT[self.kv_dtype]}" if self.mixed else ""
        extra = "-own-masks" * self.own_masks + f"-scale{self.scale}" * (self.scale is not None)
        extra += f"-spread{self.spread:g}" * (self.spread != 1)
        return (
            f"{self.kind}{self.n}-b{self.batch}-h{self.heads}x{self.kv_heads}-d{self.head_dim}-prefix{self.prefix}"
            f"-{SHORT[self.dtype]}{cache}-{self.layout}{extra}"
        )


CASES = [
    *(Case(n=n, heads=2, kv_heads=1, head_dim=16) for n in (1, 2, 3, 8, 31, 63, 64, 65)),
    *(Case(n=n, heads=2, kv_heads=1, head_dim=8, prefix=70, own_masks=True) for n in (127, 128, 129, 192, 255, 256)),
    *(Case(n=5, batch=1, head_dim=d) for d in (1, 2, 3, 7, 8, 15, 16, 17, 33, 40, 64, 80, 96, 100, 128, 200, 255, 256)),
    *(Case(heads=h, kv_heads=k) for h, k in ((1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (4, 4), (9, 3), (10, 5), (12, 4))),
    *(Case(n=3, prefix=p, head_dim=24) for p in (0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 1023)),
    *(Case(batch=b, own_masks=own) for b in (1, 3, 5) for own in (False, True)),
    *(Case(dtype=d, head_dim=64, kind=k) for d in (BF16, F16) for k in ("chain", "star", "random")),
    *(Case(dtype=d, n=65, batch=1, heads=3, kv_heads=3, head_dim=16, prefix=5) for d in (BF16, F16)),
    *(Case(dtype=F32, kv_dtype=d, head_dim=d_h) for d in (BF16, F16) for d_h in (20, 64)),
    *(Case(layout=layout, own_masks=True) for layout in ("gaps", "engine", "heads-first", "expanded")),
    *(Case(layout="engine", dtype=BF16, head_dim=h) for h in (24, 64)),
    Case(kind="chain", n=64, batch=1, head_dim=16),
    Case(kind="star", n=64, batch=1, head_dim=16),
    *(Case(spread=spread) for spread in (0.0, 30.0, 1000.0)),
    Case(spread=1000.0, dtype=BF16),
    *(Case(scale=scale) for scale in (0.0, 1.0, -0.5)),
]


def inputs(case: Case):
    g = cases.generator(case)
    trees = [cases.tree_of(case.kind, case.n, g) for _ in range(case.batch if case.own_masks else 1)]
    lengths = cases.ragged(case.batch, case.prefix, g)
    q = cases.normal((case.batch, case.n, case.heads, case.head_dim), case.dtype, g, case.spread)
    shape = (2, case.batch, case.prefix + case.n + 3, case.kv_heads, case.head_dim)
    cache = cases.normal(shape, case.kv_dtype or case.dtype, g)
    for b, length in enumerate(lengths.tolist()):
        cache[:, b, length + case.n :] = torch.nan
    k, v = cache
    mask = torch.stack([tree.mask_words for tree in trees])
    if case.layout == "dense":
        k, v = k.contiguous(), v.clone()
    elif case.layout == "gaps":
        q, mask = cases.strided(q), cases.strided(mask)
        k, v = cases.strided(cache)
    elif case.layout == "engine":  # q is a slice of a fused projection, the caches one layer of a big one
        fused = q.new_full((case.batch, case.n, case.heads + 2, case.head_dim), torch.nan)
        fused[:, :, : case.heads] = q
        q = fused[:, :, : case.heads]
        k, v = torch.stack([torch.full_like(cache, torch.nan), cache])[1]
    elif case.layout == "heads-first":
        q = cases.transposed(q)
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    elif case.layout == "expanded":  # every sequence reads the first one's cache
        lengths[:] = lengths[0]
        k, v = k[:1].expand_as(k), v[:1].expand_as(v)
    visible = torch.stack([oracles.ancestors(tree.parents.tolist()) for tree in trees])
    return (q, k, v, lengths, mask if case.own_masks else mask[0]), visible.expand(case.batch, -1, -1)


@matrix(OP, CASES)
def test_against_dense_mask(backend, case):
    (q, k, v, lengths, mask), visible = inputs(case)
    actual = backend.run(OP, q, k, v, lengths, mask, scale=case.scale)
    assert actual.dtype == case.dtype
    exact, plain = (
        oracles.tree_attention(q, k, v, lengths, visible, case.scale, dtype) for dtype in (torch.float64, case.dtype)
    )
    assert_close(actual, exact, plain)


@every_backend(OP)
def test_a_node_equals_plain_decoding_of_its_own_path(backend):
    case = Case(n=13, batch=1, prefix=21, head_dim=32)
    (q, k, v, lengths, mask), visible = inputs(case)
    whole = backend.run(OP, q, k, v, lengths, mask)
    exact = oracles.tree_attention(q, k, v, lengths, visible, None, torch.float64)
    prefix = int(lengths[0])
    one = Tree.from_choices([]).mask_words
    for node in range(case.n):
        path = visible[0, node].nonzero()[:, 0]
        rows = torch.cat([torch.arange(prefix), prefix + path])
        decoded = backend.run(OP, q[:, node : node + 1], k[:, rows], v[:, rows], lengths + len(path) - 1, one)
        assert_close(decoded, exact[:, node : node + 1], whole[:, node : node + 1])


@every_backend(OP)
def test_strides_of_single_elements_do_not_matter(backend):
    """Of one sequence, or one K/V head, nothing is stepped over: PyTorch may give that dimension any stride."""
    g = cases.generator("strides")
    q, k, v = (torch.randn(shape, generator=g) for shape in ((1, 1, 2, 16), (1, 10, 1, 16), (2, 10, 1, 16)))
    seqlens, mask = torch.tensor([4], dtype=torch.int32), Tree.from_choices([]).mask_words
    expected = backend.run(OP, q, k, v[:1].clone(), seqlens, mask)
    assert torch.equal(backend.run(OP, q, k, v[::2], seqlens, mask), expected)
    moved = v[:1].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(backend.run(OP, q, k, moved, seqlens, mask), expected)


@every_backend(OP)
def test_a_sequence_does_not_depend_on_its_neighbours(backend):
    (q, k, v, lengths, mask), _ = inputs(Case(batch=3, own_masks=True))
    together = backend.run(OP, q, k, v, lengths, mask)
    for b in range(3):
        alone = backend.run(OP, *(t[b : b + 1] for t in (q, k, v, lengths, mask)))
        assert torch.equal(alone, together[b : b + 1])


@every_backend(OP)
def test_keys_of_an_infinite_distance_weigh_nothing(backend):
    """The first 128 scores overflow to -inf, and so do some of the others."""
    q, k = torch.full((1, 1, 1, 8), 1e20), torch.zeros(1, 201, 1, 8)
    k[0, :128] = k[0, 150:160] = -1e20
    v = torch.ones(1, 201, 1, 8)
    v[0, :128] = 5.0
    lengths, alone = torch.tensor([200], dtype=torch.int32), torch.ones(1, 1, dtype=torch.int64)
    assert torch.equal(backend.run(OP, q, k, v, lengths, alone), torch.ones(1, 1, 1, 8))


@every_backend(OP)
@pytest.mark.parametrize("rows", [(0, 1), (1, 0)], ids=["prefix-first", "prefix-last"])
def test_one_huge_score_takes_all(backend, rows):
    """A one-hot softmax copies one row of V: 1e4 against 0 leaves nothing else above fp32's rounding."""
    q = torch.zeros(1, 2, 1, 8)
    q[..., 0] = 100.0
    k, v = torch.zeros(1, 4, 1, 8), torch.randn(1, 4, 1, 8, generator=cases.generator(rows))
    k[0, rows[0], 0, 0] = 100.0
    out = backend.run(OP, q, k, v, torch.tensor([2], dtype=torch.int32), Tree.named("chain-1").mask_words, scale=1.0)
    assert torch.equal(out, v[:, rows[0]].view(1, 1, 1, 8).expand_as(out))
