"""Which backends are here, that each really runs what it is called after, and that the harness would notice if it
cheated."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import medusa_kernels as mk
from medusa_kernels import _backends, launches, native
from medusa_kernels._check import MAX_HEAD_DIM, MAX_NODES

from . import backends
from .backends import OPS, REFERENCE, Backend, backends_for

HAS_MODULE = _backends._C is not None
CUDA_SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"


def x86(feature: str) -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            return feature in file.read()
    except OSError:
        return False


@pytest.mark.parametrize("op", OPS)
def test_the_expected_backends_are_here(op):
    found = {backend.id for backend in backends_for(op)}
    expected = {"reference"}
    if HAS_MODULE:
        expected |= {"cpu-portable"} | {
            f"cpu-{isa}" for isa, flag in (("avx2", "avx2"), ("avx512", "avx512_vnni")) if x86(flag)
        }
    if HAS_MODULE and _backends._C.built_with_cuda and torch.cuda.is_available():
        expected.add("cuda")
    if (Path(mk.__file__).parent / "triton" / f"{op}.py").exists() and importlib.util.find_spec("triton"):
        expected.add("triton" if torch.cuda.is_available() else "triton-interpreted")
    if not torch.cuda.is_available() and (CUDA_SOURCES / op).with_suffix(".cu").exists() and shutil.which("g++"):
        expected.add("cuda-emulated")
    assert found == expected
    assert not backends.problems


def test_the_compiled_module_is_here():
    """A source tree that was never built can run the reference, but that is no test of the project."""
    assert HAS_MODULE, _backends._BUILD_ERROR


@pytest.mark.parametrize("op", OPS)
def test_auto_on_the_cpu_is_the_compiled_kernel(op):
    table = importlib.import_module(f"medusa_kernels.{op}").BACKENDS
    assert _backends.resolve(op, table, "auto", torch.device("cpu")) is table["cpu"]


def test_each_instruction_set_is_in_force():
    for backend in backends_for("silu_mul"):
        if backend.isa:
            with backend.active():
                assert _backends._C.cpu.isa() == backend.isa
    best = next(b.isa for b in backends_for("silu_mul") if b.isa)
    assert _backends._C.cpu.isa() == best


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="sse9"):
        _backends._C.cpu.force_isa("sse9")


def broken(op: str, launch) -> Backend:
    return Backend("broken", "reference", launches={op: launch})


def test_the_harness_notices_a_write_to_an_input():
    def launch(gate_up, out):
        gate_up.add_(1)
        out.zero_()

    with pytest.raises(AssertionError, match="wrote to its argument gate_up"):
        broken("silu_mul", launch).run("silu_mul", torch.ones(1, 2))


def test_the_harness_notices_a_missing_write():
    lazy = broken("silu_mul", lambda gate_up, out: out[:, :1].fill_(1.0))
    with lazy.active():
        out = lazy.run("silu_mul", torch.ones(1, 4))
    assert out[:, 1:].isnan().all()
    with REFERENCE.active():
        assert not REFERENCE.run("silu_mul", torch.ones(1, 4)).isnan().any()


@pytest.mark.skipif(not HAS_MODULE, reason="medusa_kernels._C is not built")
def test_the_kernels_have_room_for_what_the_front_doors_let_through():
    assert _backends._C.max_nodes == MAX_NODES
    assert _backends._C.max_head_dim == MAX_HEAD_DIM


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    before = _backends._C.cpu.num_threads()
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 300, generator=g), torch.randn(211, 300, generator=g)
    q, k, v = torch.randn(3, 2, 40, 6, 32, generator=g)
    tree, lengths = mk.Tree.named("4x3"), torch.tensor([3, 5], dtype=torch.int32)

    def run():
        return (
            mk.linear(x, weight, backend="cpu"),
            mk.tree_attention(q[:, : tree.num_nodes], k, v, lengths, tree.mask_words, backend="cpu"),
            *mk.draft_heads(x, torch.zeros(2, 1, 300, 300), None, weight, 9, backend="cpu"),
        )

    expected = run()
    try:
        _backends._C.cpu.set_num_threads(threads)
        actual = run()
    finally:
        _backends._C.cpu.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_an_engine_s_launches_do_what_the_doors_do(backend):
    resolved = launches.resolve_all(backend, torch.device("cpu"))
    assert tuple(sorted(resolved)) == tuple(sorted(OPS))
    gate_up, out = torch.randn(3, 8), torch.full((3, 4), torch.nan)
    again = launches.bind(resolved["silu_mul"], gate_up, out)
    again()
    assert torch.equal(out, mk.silu_mul(gate_up, backend=backend))
    gate_up.mul_(2)  # the same tensors, new values
    again()
    assert torch.equal(out, mk.silu_mul(gate_up, backend=backend))


def test_a_bound_launch_goes_to_the_stream_of_its_call(monkeypatch):
    """Not to that of its binding: a graph is captured on a stream of its own."""
    current, launched = SimpleNamespace(cuda_stream=1), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    launch = _backends.Native("cuda", "silu_mul", lambda gate_up, out: (10, 20))
    launch.function = lambda *arguments: launched.append(arguments)
    call = launches.bind(launch, torch.zeros(1, 2), torch.zeros(1, 1))
    for current.cuda_stream in (1, 7, 0):
        call()
    assert launched == [(10, 20, 1), (10, 20, 7), (10, 20, 0)]


class Gpus:
    """torch.cuda of a machine with several, as far as launches ask: which is current, and each one's stream."""

    def __init__(self, monkeypatch, current: int = 0):
        self.current, self.changes = current, 0
        self.stream = 0  # the default stream: the same handle on every device
        for name in ("current_device", "current_stream", "device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def current_device(self) -> int:
        return self.current

    def current_stream(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=self.stream)

    @contextlib.contextmanager
    def device(self, device: torch.device):
        before, self.current = self.current, device.index
        self.changes += 1
        try:
            yield
        finally:
            self.current = before


def on_gpu(index: int, **attributes) -> SimpleNamespace:
    """What a launch asks of a tensor."""
    return SimpleNamespace(device=torch.device("cuda", index), **attributes)


def test_a_launch_goes_to_its_tensors_device(monkeypatch):
    """Whichever is current: to size its workspace, at its binding, and at each call."""
    gpus, seen = Gpus(monkeypatch), []
    launch = _backends.Native("cuda", "silu_mul", lambda *tensors: (seen.append(("sized", gpus.current)), 10))
    launch.function = lambda *arguments: seen.append(("launched", gpus.current))
    call = launches.bind(launch, on_gpu(1), on_gpu(1))
    for gpus.current in (0, 1, 2):
        call()
        launch(on_gpu(1), on_gpu(1))
        assert seen == [("sized", 1)] * (gpus.current == 0) + [("launched", 1), ("sized", 1), ("launched", 1)]
        seen.clear()


def test_a_launch_on_the_current_device_changes_none(monkeypatch):
    gpus = Gpus(monkeypatch, current=1)
    launch = _backends.Native("cuda", "silu_mul", lambda *tensors: ())
    launch.function = lambda stream: None
    launch(on_gpu(1))
    assert gpus.changes == 0


def test_a_lazy_launch_goes_to_its_tensors_device(monkeypatch):
    gpus, seen = Gpus(monkeypatch), []
    room = SimpleNamespace(launch=lambda *tensors: seen.append(gpus.current))
    monkeypatch.setitem(sys.modules, "medusa_kernels.a_lazy_room", room)
    launch = _backends.Lazy("medusa_kernels.a_lazy_room")
    launch(on_gpu(1))
    launches.bind(launch, on_gpu(2))()
    launch(torch.zeros(1))
    assert seen == [1, 2, 0]


@pytest.fixture
def workspace(monkeypatch):
    """sized(scratch bytes, counters, on device): the addresses that a CUDA launch gets, as tensors; and the GPUs."""
    gpus = Gpus(monkeypatch)
    gpus.capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpus.capturing)
    for name in ("_SCRATCH", "_COUNTERS"):
        monkeypatch.setattr(native, name, {})
    for make in ("empty", "zeros"):
        real = getattr(torch, make)
        monkeypatch.setattr(torch, make, lambda size, dtype, device, real=real: real(size, dtype=dtype))

    def sized(scratch: int, counters: int = 1, device: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        library = SimpleNamespace(an_op_workspace=lambda: (scratch, counters))
        held = native.with_workspace("an_op", lambda tensor: (), library)(on_gpu(device))
        assert held == tuple(address.tensor.data_ptr() for address in held)
        return tuple(address.tensor for address in held)

    return sized, gpus


def test_one_streams_launches_share_a_workspace(workspace):
    sized, gpus = workspace
    scratch, counters = sized(1000)
    for size in (1000, 10, 0):
        assert all(a is b for a, b in zip(sized(size), (scratch, counters), strict=True))
    gpus.stream = 7
    assert not {*map(id, sized(10))} & {id(scratch), id(counters)}
    gpus.stream = 0
    assert not {*map(id, sized(10, device=1))} & {id(scratch), id(counters)}
    assert sized(10)[0] is scratch


def test_an_outgrown_workspace_lives_as_long_as_its_launches(workspace):
    sized, _ = workspace
    first, second = sized(1000), sized(1001, 5000)
    assert first[0].numel() == 1000
    assert second[0].numel() == 1001
    assert second[1].numel() == 5000
    assert sized(1000)[0] is second[0]
    small = weakref.ref(first[0]), weakref.ref(first[1])
    del first
    assert small[0]() is None
    assert small[1]() is not None  # counters are small, and a graph may know them


def test_a_captured_launch_has_a_workspace_of_its_graph(workspace):
    """The shared one may go before the graph does; and zeros that are captured are written at its replay."""
    sized, gpus = workspace
    shared = sized(1000)
    gpus.capturing = True
    assert sized(10)[0] is not shared[0]
    assert sized(10)[1] is shared[1]  # zero already
    assert sized(10, 5000)[1] is not sized(10, 5000)[1]
    gpus.capturing = False
    assert all(a is b for a, b in zip(sized(10), shared, strict=True))


def test_a_graph_holds_kernels_alone():
    """Every launch but the reference's, which may read values."""
    for op in launches._BACKENDS.values():
        assert {name for name, launch in op.items() if not launches.capturable(launch)} == {"reference"}


def test_importing_the_ops_is_light():
    """Neither Triton nor the engine nor transformers comes along."""
    heavy = ("triton", "transformers", "medusa_engine", "tokenizers")
    code = f"import sys, medusa_kernels; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plan_makes_its_calls_in_order():
    """Launches of the CPU's kernels and other calls in turn, each on what the one before it wrote."""
    scale, gate_up, out = torch.full((4,), 2.0), torch.randn(3, 8), torch.empty(3, 4)
    launch = launches.resolve_all("cpu" if HAS_MODULE else "reference", torch.device("cpu"))
    calls = [
        launches.bind(launch["silu_mul"], gate_up, out),
        launches.bind(launch["rms_norm"], out, scale, 1e-6, None, out),
        lambda: out.mul_(3),
        launches.bind(launch["rms_norm"], out, scale, 1e-6, None, out),
    ]
    run = launches.plan(calls)
    for _ in range(2):
        gate_up.copy_(torch.randn(3, 8))
        for call in calls:
            call()
        expected = out.clone()
        out.zero_()
        run()
        assert torch.equal(out, expected)
