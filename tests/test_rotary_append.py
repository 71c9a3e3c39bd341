"""rotary_append: rotation as multiplication by a complex number in float64; only the step's own cache rows change."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import cases, oracles
from .backends import every_backend, matrix
from .cases import BF16, F16, F32, SHORT
from .tolerances import assert_close

OP = "rotary_append"


@dataclass(frozen=True)
class Case:
    n: int = 9
    kind: str = "random"
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    rotary_dim: int | None = None
    prefix: int = 21
    dtype: torch.dtype = F32
    kv_dtype: torch.dtype | None = None
    norm: torch.dtype | None = None
    layout: str = "dense"
    own_trees: bool = False

    @property
    def mixed(self) -> bool:
        return self.kv_dtype not in (None, self.dtype)

    @property
    def work(self) -> int:
        return self.batch * self.n * (self.heads + 2 * self.kv_heads) * self.head_dim

    def __str__(self) -> str:
        cache = f"-into-{SHORT[self.kv_dtype]}" if self.mixed else ""
        norm = f"-norm-{SHORT[self.norm]}" if self.norm else ""
        return (
            f"{self.kind}{self.n}-b{self.batch}-h{self.heads}x{self.kv_heads}-d{self.head_dim}"
            f"-rotary{self.rotary_dim or self.head_dim}-prefix{self.prefix}-{SHORT[self.dtype]}{cache}{norm}"
            f"-{self.layout}{'-own-trees' * self.own_trees}"
        )


CASES = [
    *(Case(n=n, batch=1, head_dim=8) for n in (1, 2, 3, 16, 63, 64, 65, 128, 129, 256)),
    *(Case(head_dim=d, n=3) for d in (2, 4, 6, 8, 16, 34, 64, 80, 96, 100, 128, 254, 256)),
    *(Case(head_dim=d, rotary_dim=r, n=3) for d, r in ((3, 2), (7, 4), (32, 2), (64, 16), (100, 30), (255, 128))),
    *(Case(heads=h, kv_heads=k, n=2) for h, k in ((1, 1), (2, 1), (3, 1), (8, 1), (4, 4), (9, 3))),
    *(Case(batch=b, own_trees=own) for b in (1, 3, 5) for own in (False, True)),
    *(Case(prefix=p) for p in (0, 1, 300)),
    *(Case(dtype=d, norm=norm) for d in (F32, BF16, F16) for norm in (None, F32, d)),
    *(Case(kv_dtype=d, norm=norm) for d in (BF16, F16) for norm in (None, BF16)),
    *(Case(layout="engine", dtype=d, norm=norm) for d in (F32, BF16) for norm in (None, F32)),
    *(Case(layout=layout, dtype=d) for layout in ("gaps", "heads-first") for d in (F32, BF16)),
]


def inputs(case: Case):
    g = cases.generator(case)
    rows = case.prefix + case.n + 2
    trees = [cases.tree_of(case.kind, case.n, g) for _ in range(case.batch if case.own_trees else 1)]
    depths = torch.stack([tree.depths for tree in trees])
    lengths = cases.ragged(case.batch, case.prefix, g)
    shape = (case.batch, case.n, case.heads + 2 * case.kv_heads, case.head_dim)
    qkv = cases.normal(shape, case.dtype, g)
    q, k, v = qkv.split([case.heads, case.kv_heads, case.kv_heads], dim=2)
    caches = torch.full(
        (2, case.batch, rows, case.kv_heads, case.head_dim), torch.nan, dtype=case.kv_dtype or case.dtype
    )
    k_cache, v_cache = caches
    if case.layout == "dense":
        q, k, v, k_cache, v_cache = (
            t.clone(memory_format=torch.contiguous_format) for t in (q, k, v, k_cache, v_cache)
        )
    elif case.layout == "gaps":
        q, k, v, depths = (cases.strided(t) for t in (q, k, v, depths))
        k_cache, v_cache = cases.strided(caches)
    elif case.layout == "heads-first":
        q, k, v, k_cache, v_cache = (
            t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, k_cache, v_cache)
        )
    half = (case.rotary_dim or case.head_dim) // 2
    angles = torch.outer(torch.arange(rows).double(), 100.0 ** (-torch.arange(half).double() / half))
    norms = (None, None)
    if case.norm:
        norms = tuple(cases.normal((case.head_dim,), case.norm, g) for _ in range(2))
    tensors = [q, k, v, angles.cos().float(), angles.sin().float(), k_cache, v_cache, lengths]
    return tensors, depths if case.own_trees else depths[0], norms, angles


@matrix(OP, CASES)
def test_against_float64(backend, case):
    tensors, depths, (q_norm, k_norm), angles = inputs(case)
    q, k, v, _, _, k_cache, v_cache, lengths = tensors
    before = [t.clone() for t in (q, k, v)]
    result = backend.run(OP, *tensors, depths, q_norm=q_norm, k_norm=k_norm, norm_eps=1e-5)
    assert result is None

    def expected(x, weight, b, dtype):
        at = int(lengths[b]) + (depths if depths.dim() == 1 else depths[b])
        x = x[b].to(dtype)
        return oracles.rotate(x if weight is None else oracles.rms_norm(x, weight, 1e-5, dtype), angles[at], dtype)

    for b, start in enumerate(lengths.tolist()):
        own = slice(start, start + case.n)
        for actual, x, weight in ((q[b], before[0], q_norm), (k_cache[b, own], before[1], k_norm)):
            assert_close(actual, expected(x, weight, b, torch.float64), expected(x, weight, b, actual.dtype))
        assert torch.equal(v_cache[b, own], before[2][b].to(v_cache.dtype))
        for cache in (k_cache, v_cache):
            assert cache[b, :start].isnan().all()
            assert cache[b, start + case.n :].isnan().all()
    if case.layout != "engine":  # there k and v lie between the rows of q, and run() compares whole buffers
        assert torch.equal(k, before[1])
        assert torch.equal(v, before[2])


@every_backend(OP)
def test_only_the_views_are_written(backend):
    tensors, depths, _, _ = inputs(Case(layout="gaps"))
    guarded = []
    for t in (tensors[0], tensors[5], tensors[6]):
        whole = torch.empty(0).set_(t.untyped_storage())
        outside = torch.ones_like(whole, dtype=torch.bool)
        outside.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(False)
        guarded.append((whole, outside))
    guarded[1][1].logical_and_(guarded[2][1])  # both caches lie in one buffer
    guarded[2] = guarded[1]
    backend.run(OP, *tensors, depths)
    assert all(whole[outside].isnan().all() for whole, outside in guarded)


@every_backend(OP)
def test_position_zero_changes_nothing(backend):
    tensors, _, _, _ = inputs(Case(n=1, batch=1, prefix=0))
    q, k = tensors[0].clone(), tensors[1].clone()
    backend.run(OP, *tensors, torch.zeros(1, dtype=torch.int32))
    assert torch.equal(tensors[0], q)
    assert torch.equal(tensors[5][:, :1], k)
