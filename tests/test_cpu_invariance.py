"""The CPU backend's promise: a row's bits do not depend on its neighbours, its place in the tree or the threads."""

from __future__ import annotations

import contextlib

import pytest
import torch

from medusa_kernels import (
    Tree,
    draft_heads,
    linear,
    pack_linear,
    rms_norm,
    silu_mul,
    tree_attention,
    verify_lm_head,
    verify_tree,
)
from medusa_kernels._backends import _C

pytestmark = pytest.mark.skipif(_C is None, reason="medusa_kernels._C is not built")


def has_isa(name: str) -> bool:
    try:
        _C.cpu.force_isa(name)
    except ValueError:
        return False
    _C.cpu.force_isa("auto")
    return True


ISAS = [name for name in ("avx512", "avx2", "portable") if _C is not None and has_isa(name)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
PACKED = ["float32", "bfloat16", "float16", "int8"]


@pytest.fixture(params=ISAS)
def isa(request):
    _C.cpu.force_isa(request.param)
    yield request.param
    _C.cpu.force_isa("auto")


@contextlib.contextmanager
def threads(count: int):
    before = _C.cpu.num_threads()
    _C.cpu.set_num_threads(count)
    try:
        yield
    finally:
        _C.cpu.set_num_threads(before)


def random_tree(nodes: int, generator: torch.Generator) -> Tree:
    paths = [()]
    while len(paths) < nodes:
        parent = paths[int(torch.randint(len(paths), (), generator=generator))]
        rank = sum(path[:-1] == parent for path in paths if path)
        paths.append((*parent, rank))
    return Tree.from_choices([list(path) for path in paths[1:]])


@pytest.mark.parametrize("kv_dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("prefix", "nodes", "heads", "kv_heads", "head_dim"),
    [
        (0, 1, 1, 1, 8),
        (0, 40, 6, 2, 64),
        (5, 64, 9, 3, 64),
        (250, 12, 4, 4, 20),
        (255, 70, 2, 1, 80),
        (700, 33, 8, 2, 128),
        (1030, 9, 3, 1, 5),
    ],
    ids=str,
)
def test_a_tree_node_attends_as_plain_decoding(isa, kv_dtype, prefix, nodes, heads, kv_heads, head_dim):
    generator = torch.Generator().manual_seed(prefix + nodes)
    tree = random_tree(nodes, generator)
    rows = prefix + tree.num_nodes
    q = torch.randn(1, nodes, heads, head_dim, generator=generator)
    k, v = (torch.randn(1, rows + 3, kv_heads, head_dim, generator=generator).to(kv_dtype) for _ in range(2))
    k[:, rows:] = v[:, rows:] = torch.nan
    whole = tree_attention(q, k, v, torch.tensor([prefix], dtype=torch.int32), tree.mask_words, backend="cpu")
    parents = tree.parents.tolist()
    alone_mask = torch.ones(1, 1, dtype=torch.int64)
    for node in range(nodes):
        path = [node]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        kept = list(range(prefix)) + [prefix + i for i in reversed(path)]
        seqlens = torch.tensor([len(kept) - 1], dtype=torch.int32)
        alone = tree_attention(q[:, node : node + 1], k[:, kept], v[:, kept], seqlens, alone_mask, backend="cpu")
        assert torch.equal(alone[0, 0], whole[0, node])


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(64, 576, 960), (17, 100, 33), (256, 70, 129), (9, 1, 1)], ids=str
)
def test_a_linear_row_stands_alone(isa, dtype, rows, inputs, outputs):
    torch.manual_seed(0)
    x, bias, residual = torch.randn(rows, inputs), torch.randn(outputs), torch.randn(rows, outputs)
    weight = pack_linear(torch.randn(outputs, inputs), dtype)
    whole = linear(x, weight, bias, residual=residual, backend="cpu")
    for count in [c for c in range(1, 66) if c < rows]:
        assert torch.equal(linear(x[:count], weight, bias, residual=residual[:count], backend="cpu"), whole[:count])
    for row in range(rows):
        alone = linear(x[row : row + 1], weight, bias, residual=residual[row : row + 1], backend="cpu")
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_plain_and_packed_weights_agree(isa, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 131), torch.randn(77, 131).to(dtype)
    packed = pack_linear(weight, str(dtype).removeprefix("torch."))
    assert torch.equal(linear(x, weight, backend="cpu"), linear(x, packed, backend="cpu"))


@pytest.mark.parametrize("dtype", PACKED)
def test_packed_layout_is_the_same_for_every_isa(dtype):
    weight = torch.randn(3, 45, 77)
    packed = []
    for name in ISAS:
        _C.cpu.force_isa(name)
        packed.append(pack_linear(weight, dtype).data)
    _C.cpu.force_isa("auto")
    assert all(torch.equal(packed[0], other) for other in packed[1:])


def test_int8_sums_are_those_of_integers(isa):
    """Groups of 64 along k, quantised symmetrically; sums inside a group are exact, so every ISA has the same."""
    torch.manual_seed(0)
    rows, inputs, outputs, group = 3, 200, 40, 64
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    x[:, :64] *= 100
    weight[3] = 0
    x[1, 64:128] = 0
    weight_scale = weight.abs().amax(dim=1) / 127
    inverse = torch.where(weight_scale > 0, 127 / weight.abs().amax(dim=1), 0.0)
    quantised = (weight * inverse[:, None]).round()
    expected = torch.zeros(rows, outputs, dtype=torch.float64)
    for begin in range(0, inputs, group):
        part = x[:, begin : begin + group]
        most = part.abs().amax(dim=1, keepdim=True)
        bytes_ = (part * torch.where(most > 0, 127 / most, 0.0)).round()
        expected += (bytes_ @ quantised[:, begin : begin + group].T).double() * (most / 127).double()
    expected *= weight_scale.double()
    actual = linear(x, pack_linear(weight, "int8"), backend="cpu")
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_of_the_small_ops_stand_alone(isa, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(37, 577).to(dtype), torch.randn(577)
    gate_up = torch.randn(37, 2 * 301).to(dtype)
    normed, gated = rms_norm(x, weight, 1e-5, backend="cpu"), silu_mul(gate_up, backend="cpu")
    for row in range(37):
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-5, backend="cpu")[0], normed[row])
        assert torch.equal(silu_mul(gate_up[row : row + 1], backend="cpu")[0], gated[row])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_results_do_not_depend_on_the_threads(isa, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(8, 320), pack_linear(torch.randn(1000, 320), dtype)
    blocks, lm_head = pack_linear(torch.randn(3, 1, 320, 320) / 18, dtype), pack_linear(torch.randn(5003, 320), dtype)
    q, kv = torch.randn(2, 8, 6, 64), torch.randn(2, 2, 2100, 2, 64).bfloat16()
    mask, seqlens = Tree.named("chain-7").mask_words, torch.tensor([2050, 77], dtype=torch.int32)
    logits, tokens = torch.randn(2, 8, 5003), torch.randint(5003, (2, 8), dtype=torch.int32)
    parents = Tree.named("chain-7").parents

    def everything():
        return (
            linear(x, weight, backend="cpu"),
            *draft_heads(x, blocks, None, lm_head, 7, backend="cpu"),
            tree_attention(q, *kv, seqlens, mask, backend="cpu"),
            *verify_tree(logits, tokens, parents, mode=["typical", "lossless"], top_p=0.9, seed=3, backend="cpu"),
            *verify_lm_head(
                x.view(2, 4, 320), lm_head, tokens[:, :4], parents[:4], mode=["greedy", "lossless"], seed=3
            ),
        )

    with threads(1):
        expected = everything()
    for count in (2, 3, 5):
        with threads(count):
            for _ in range(5):
                assert all(torch.equal(a, b) for a, b in zip(everything(), expected, strict=True))


def test_a_draft_row_stands_alone(isa):
    torch.manual_seed(0)
    hidden, blocks, lm_head = torch.randn(5, 64), torch.randn(3, 2, 64, 64) / 8, torch.randn(1500, 64)
    tokens, logprobs = draft_heads(hidden, blocks, None, lm_head, 9, backend="cpu")
    for row in range(5):
        alone = draft_heads(hidden[row : row + 1], blocks, None, lm_head, 9, backend="cpu")
        assert torch.equal(alone[0][0], tokens[row])
        assert torch.equal(alone[1][0], logprobs[row])


def test_tree_sampling_draws_what_plain_sampling_draws(isa):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 1, 3001, generator=generator) * 3
    root = torch.tensor([-1], dtype=torch.int32)
    for seed in range(20):
        settings = {"mode": "lossless", "temperature": 0.8, "top_p": 0.95, "top_k": 300, "seed": seed, "backend": "cpu"}
        plain = verify_tree(logits, torch.zeros(1, 1, dtype=torch.int32), root, **settings)[2]
        tree = Tree.named("chain-3")
        tokens = torch.full((1, 4), int(plain), dtype=torch.int32)
        nodes, length, _ = verify_tree(logits.expand(1, 4, 3001), tokens, tree.parents, **settings)
        assert int(length) >= 1
        assert nodes[0, 1] == 1
