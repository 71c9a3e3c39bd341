"""Each op as a torch.library custom op: opcheck, torch.compile without a graph break, torch.export."""

from __future__ import annotations

import pytest
import torch

import medusa_kernels as mk
from medusa_kernels import Tree
from medusa_kernels.verify_tree import acceptance

from . import cases
from .backends import OPS, WRITTEN

TREE = Tree.from_choices([[0], [1], [0, 0], [1, 0]])
BATCH, N, SEQ = 2, TREE.num_nodes, 12
SEEDED = {"mode": ["lossless", "typical"], "temperature": 0.8, "top_p": [0.9, 1.0], "seed": 7, "max_depth": 2}


def arguments(op: str) -> tuple[tuple, dict]:
    """A call of the front door."""
    g = cases.generator(op)
    caches = [cases.normal((BATCH, SEQ, 2, 8), torch.float32, g) for _ in range(2)]
    lengths = torch.tensor([0, 4], dtype=torch.int32)
    q = cases.normal((BATCH, N, 4, 8), torch.float32, g)
    new = [cases.normal((BATCH, N, 2, 8), torch.float32, g) for _ in range(2)]
    weights = [cases.normal(shape, torch.float32, g) for shape in ((3, 1, 16, 16), (3, 1, 16), (11, 16))]
    logits, tokens = cases.normal((BATCH, N, 11), torch.float32, g), cases.integers((BATCH, N), 0, 10, g)
    x = cases.normal((3, 16), torch.float32, g)
    return {
        "tree_attention": ((q, *caches, lengths, TREE.mask_words), {}),
        "draft_heads": ((x, *weights, 5), {"token_map": torch.arange(11, dtype=torch.int32) + 3}),
        "verify_tree": ((logits, tokens, TREE.parents), dict(SEEDED)),
        "verify_lm_head": (
            (cases.normal((BATCH, N, 16), torch.float32, g), weights[2], tokens, TREE.parents),
            {key: value for key, value in SEEDED.items() if key != "top_p"}),
        "compact_kv": (
            (cases.normal((2, 2, BATCH, SEQ, 2, 8), torch.float32, g),
             torch.tensor([[0, 2, 4], [0, -1, -1]], dtype=torch.int32),
             torch.tensor([2, 0], dtype=torch.int32), lengths),
            {}),
        "rms_norm": ((x, x[0].clone(), 1e-5), {"residual": x.clone()}),
        "rotary_append": ((q, *new, *torch.randn(2, SEQ, 4, generator=g).unbind(), *caches, lengths, TREE.depths), {}),
        "silu_mul": ((x,), {}),
        "linear": ((x, weights[2]), {"bias": weights[2][:, 0].clone(), "residual": torch.randn(3, 11, generator=g)}),
    }[op]  # fmt: skip


def clone(value):
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, value)


def op_arguments(op: str, backend: str) -> tuple:
    """The same call of torch.ops.medusa_kernels, whose arguments are all positional."""
    args, kwargs = arguments(op)
    not_packed = ([], "") * {"linear": 1, "draft_heads": 2, "verify_lm_head": 1}.get(op, 0)
    if op in ("verify_tree", "verify_lm_head"):
        width = kwargs.pop("max_depth")
        return (*args, list(acceptance(BATCH, torch.device("cpu"), **kwargs)), width, backend, *not_packed)
    tail = {
        "tree_attention": (None, False),
        "draft_heads": (kwargs.get("token_map"),),
        "rms_norm": (kwargs.get("residual"),),
        "rotary_append": (None, None, 1e-6),
        "linear": (kwargs.get("bias"), kwargs.get("residual"), False),
    }.get(op, ())
    return (*args, *tail, backend, *not_packed)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, backend):
    torch.library.opcheck(getattr(torch.ops.medusa_kernels, op), op_arguments(op, backend))


def test_opcheck_of_greedy_verification():
    args, _ = arguments("verify_tree")
    torch.library.opcheck(torch.ops.medusa_kernels.verify_tree, (*args, [], 2, "cpu"))


@pytest.mark.parametrize("op", OPS)
def test_the_op_declares_what_it_writes(op):
    schema = getattr(torch.ops.medusa_kernels, op).default._schema
    written = tuple(a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write)
    assert written == WRITTEN.get(op, ())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("op", OPS)
def test_compile_without_a_graph_break(op, compiler, backend):
    args, kwargs = arguments(op)
    kwargs["backend"] = backend
    eager_args, compiled_args = clone((args, kwargs)), clone((args, kwargs))
    door = getattr(mk, op)
    expected = door(*eager_args[0], **eager_args[1])
    torch._dynamo.reset()
    actual = torch.compile(lambda *a, **k: door(*a, **k), fullgraph=True, backend=compiler)(
        *compiled_args[0], **compiled_args[1]
    )
    flat = [torch.utils._pytree.tree_leaves(t) for t in ((actual, compiled_args), (expected, eager_args))]
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*flat, strict=True))


@pytest.mark.parametrize("op", ["linear", "draft_heads", "verify_lm_head"])
def test_compile_with_packed_weights(op):
    args, kwargs = arguments(op)
    places = {"linear": (1,), "draft_heads": (1, 3), "verify_lm_head": (1,)}[op]
    args = [mk.pack_linear(a, "int8") if i in places else a for i, a in enumerate(args)]
    door = getattr(mk, op)
    torch._dynamo.reset()
    actual = torch.compile(lambda: door(*args, **kwargs), fullgraph=True, backend="aot_eager")()
    leaves = torch.utils._pytree.tree_leaves
    assert all(torch.equal(a, b) for a, b in zip(leaves(actual), leaves(door(*args, **kwargs)), strict=True))


@pytest.mark.parametrize("op", ["tree_attention", "draft_heads", "verify_tree", "verify_lm_head", "rms_norm",
                                "silu_mul", "linear"])  # fmt: skip
def test_export(op):
    args, kwargs = arguments(op)
    kwargs.pop("residual", None)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return getattr(mk, op)(*tensors, **kwargs)

    exported = torch.export.export(Module(), args)
    assert any(f"medusa_kernels.{op}" in str(node.target) for node in exported.graph.nodes)
    expected, actual = getattr(mk, op)(*args, **kwargs), exported.module()(*args)
    leaves = torch.utils._pytree.tree_leaves
    assert all(torch.equal(a, b) for a, b in zip(leaves(actual), leaves(expected), strict=True))


@pytest.mark.parametrize("op", ["tree_attention", "draft_heads", "verify_tree", "rms_norm", "silu_mul", "linear"])
def test_compile_of_arguments_that_want_gradients(op):
    """Parameters, with gradients on: the ops give none, compiled or not."""

    def wanting(value):
        return value.requires_grad_() if value.is_floating_point() else value

    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, wanting, clone(arguments(op)))
    expected = getattr(mk, op)(*args, **kwargs)
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, wanting, clone(arguments(op)))
    torch._dynamo.reset()
    door = getattr(mk, op)
    actual = torch.compile(lambda *a, **k: door(*a, **k), fullgraph=True, backend="aot_eager")(*args, **kwargs)
    leaves = torch.utils._pytree.tree_leaves
    for a, b in zip(leaves(actual), leaves(expected), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


def test_a_compiled_call_still_checks_values():
    args, kwargs = arguments("verify_tree")
    verify = torch.compile(
        lambda *a: mk.verify_tree(*a, **kwargs | {"temperature": -1.0}), fullgraph=True, backend="eager"
    )
    with pytest.raises(ValueError, match="temperature must be finite, at least 0"):
        verify(*args)


def test_a_compiled_verification_without_a_seed_varies():
    verify = torch.compile(
        lambda logits, tokens, parents: mk.verify_tree(logits, tokens, parents, mode="lossless", max_depth=0)[2],
        fullgraph=True, backend="eager",
    )  # fmt: skip
    root = torch.zeros(1, 1, 997), torch.zeros(1, 1, dtype=torch.int32), torch.tensor([-1], dtype=torch.int32)
    assert len({int(verify(*root)) for _ in range(8)}) > 1


@pytest.mark.parametrize("op", OPS)
def test_shapes_without_data(op):
    """Fake tensors run through the op's fake kernel: same shapes, dtypes and device, nothing computed."""
    real = op_arguments(op, "reference")
    expected = getattr(torch.ops.medusa_kernels, op)(*clone(real))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, real)
        result = getattr(torch.ops.medusa_kernels, op)(*fake)
    leaves = torch.utils._pytree.tree_leaves
    described = [[(t.shape, t.dtype, t.device) for t in leaves(r) if t is not None] for r in (result, expected)]
    assert described[0] == described[1]
