"""compact_kv: rows move exactly; nothing else of a sequence's committed rows changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import cases
from .backends import every_backend, matrix
from .cases import BF16, F16, F32, SHORT

OP = "compact_kv"


@dataclass(frozen=True)
class Case:
    layers: int = 3
    batch: int = 3
    kv_heads: int = 2
    head_dim: int = 8
    prefix: int = 19
    n: int = 16
    width: int = 6
    dtype: torch.dtype = F32
    layout: str = "dense"
    path: str = (
        "random"  # "stay": nodes 0, 1, 2, ... already lie in place; "far": the last nodes; "root": nothing moves
    )

    @property
    def work(self) -> int:
        return self.layers * 2 * self.batch * self.width * self.kv_heads * self.head_dim

    def __str__(self) -> str:
        return (
            f"l{self.layers}-b{self.batch}-h{self.kv_heads}-d{self.head_dim}-prefix{self.prefix}-n{self.n}-w{self.width}"
            f"-{SHORT[self.dtype]}-{self.layout}-{self.path}"
        )


CASES = [
    Case(),
    *(Case(path=path) for path in ("stay", "far", "root")),
    *(Case(head_dim=d, kv_heads=h) for d in (1, 2, 3, 7, 8, 16, 64, 80, 100, 128, 255, 256) for h in (1, 3)),
    *(Case(dtype=d, head_dim=dim) for d in (BF16, F16) for dim in (1, 5, 8, 64)),
    *(Case(n=n, width=w, path=path) for n, w in ((1, 1), (2, 2), (63, 9), (64, 64), (65, 5), (256, 256), (256, 33))
      for path in ("random", "far")),
    *(Case(batch=b, layers=layers) for b, layers in ((1, 1), (5, 1), (1, 7))),
    *(Case(prefix=p) for p in (0, 1, 100)),
    *(Case(layout=layout, dtype=d) for layout in ("gaps", "row-major") for d in (F32, BF16)),
]  # fmt: skip


def inputs(case: Case):
    g = cases.generator(case)
    rows = case.prefix + case.n + 2
    lengths = cases.ragged(case.batch, case.prefix, g)
    cache = cases.normal((case.layers, 2, case.batch, rows, case.kv_heads, case.head_dim), case.dtype, g)
    for b, length in enumerate(lengths.tolist()):
        cache[:, :, b, length + case.n :] = torch.nan
    accepted = torch.full((case.batch, case.width), -1, dtype=torch.int32)
    lengths_accepted = cases.integers([case.batch], 0, case.width - 1, g)
    lengths_accepted[-1] = case.width - 1
    if case.path == "root":
        lengths_accepted[:] = 0
    for b, count in enumerate(lengths_accepted.tolist()):
        if case.path == "stay":
            later = torch.arange(1, count + 1)
        elif case.path == "far":
            later = torch.arange(case.n - count, case.n)
        else:
            later = (torch.randperm(case.n - 1, generator=g)[:count] + 1).sort().values
        accepted[b, 1 : count + 1] = later.int()
        accepted[b, 0] = 0
    if case.layout == "gaps":
        cache, accepted = cases.strided(cache, keep=2), cases.strided(accepted)
    elif case.layout == "row-major":  # (batch, rows, layers, 2, heads, dim) in memory
        cache = cache.permute(2, 3, 0, 1, 4, 5).contiguous().permute(2, 3, 0, 1, 4, 5)
    return cache, accepted, lengths_accepted, lengths


@matrix(OP, CASES)
def test_against_gather(backend, case):
    cache, accepted, accept_length, lengths = inputs(case)
    before = cache.clone()
    assert backend.run(OP, cache, accepted, accept_length, lengths) is None
    for b in range(case.batch):
        start, count = int(lengths[b]), int(accept_length[b]) + 1
        rows = start + accepted[b, :count].long()
        assert torch.equal(cache[:, :, b, start : start + count], before[:, :, b, rows])
        assert torch.equal(cache[:, :, b, :start], before[:, :, b, :start])
        beyond = start + case.n  # rows that hold no tree: an op has no reason to touch them
        assert torch.equal(cache[:, :, b, beyond:].isnan(), before[:, :, b, beyond:].isnan())


@every_backend(OP)
def test_nan_and_infinity_move_bit_for_bit(backend):
    cache = torch.zeros(1, 2, 1, 4, 1, 2, dtype=torch.float32)
    cache[0, 0, 0, 3, 0] = torch.tensor([torch.nan, -torch.inf])
    cache[0, 1, 0, 3, 0] = torch.tensor([-0.0, torch.inf])
    moved = cache[:, :, :, 3].clone()
    path, one = torch.tensor([[0, 2]], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    backend.run(OP, cache, path, one, one)
    assert torch.equal(cache[:, :, :, 2].view(torch.int32), moved.view(torch.int32))


@every_backend(OP)
def test_what_lies_between_strided_rows_is_not_written(backend):
    cache, accepted, accept_length, lengths = inputs(Case(layout="gaps"))
    whole = torch.empty(0).set_(cache.untyped_storage())
    inside = torch.zeros_like(whole, dtype=torch.bool).as_strided(cache.shape, cache.stride(), cache.storage_offset())
    inside.fill_(True)
    outside = ~torch.empty(0, dtype=torch.bool).set_(inside.untyped_storage())
    backend.run(OP, cache, accepted, accept_length, lengths)
    assert whole[outside].isnan().all()
