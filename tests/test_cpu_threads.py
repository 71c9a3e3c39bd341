"""The CPU backend's thread pool and instruction sets, in a process of their own where they must start afresh."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from medusa_kernels import linear, pack_linear
from medusa_kernels._backends import _C

pytestmark = pytest.mark.skipif(_C is None, reason="medusa_kernels._C is not built")


def run(code: str, **environment: str) -> str:
    setup = (
        "import os, torch\nfrom medusa_kernels import linear, pack_linear\nfrom medusa_kernels._backends import _C\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", setup + textwrap.dedent(code)],
        env={**os.environ, "MEDUSA_NUM_THREADS": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_environment_chooses_the_instruction_set():
    assert run("print(_C.cpu.isa())", MEDUSA_ISA="portable") == "portable"
    assert run("print(_C.cpu.isa())", MEDUSA_ISA="auto") == _C.cpu.isa()


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match=r"neon.*portable"):
        _C.cpu.force_isa("neon")
    assert "mmx" in run("try: _C.cpu.isa()\nexcept ValueError as e: print(e)", MEDUSA_ISA="mmx")


def test_environment_chooses_the_threads():
    assert run("print(_C.cpu.num_threads())", MEDUSA_NUM_THREADS="3") == "3"
    assert run("print(_C.cpu.num_threads())", MEDUSA_NUM_THREADS="") == str(len(os.sched_getaffinity(0)))
    assert run("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nprint(_C.cpu.num_threads())") == "1"


def test_the_pool_works_in_a_forked_child():
    code = """
    x, weight = torch.randn(4, 512), pack_linear(torch.randn(2048, 512))
    expected = linear(x, weight)
    child = os.fork()
    if not child:
        good = all(torch.equal(linear(x, weight), expected) for _ in range(20))
        os._exit(0 if good else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.equal(linear(x, weight), expected))
    """
    assert run(code, MEDUSA_NUM_THREADS="2") == "0 True"


def test_callers_from_several_threads():
    torch.manual_seed(0)
    inputs = [torch.randn(rows, 512) for rows in (1, 4, 9, 30)]
    weight = pack_linear(torch.randn(2048, 512))
    expected = [linear(x, weight) for x in inputs]
    wrong = []

    def work(index: int) -> None:
        for _ in range(50):
            if not torch.equal(linear(inputs[index], weight), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_number_of_threads_can_change_between_launches():
    before = _C.cpu.num_threads()
    x, weight = torch.randn(4, 512), pack_linear(torch.randn(2048, 512))
    expected = linear(x, weight)
    for count in (1, 4, 2, 7):
        _C.cpu.set_num_threads(count)
        assert _C.cpu.num_threads() == count
        assert torch.equal(linear(x, weight), expected)
    _C.cpu.set_num_threads(before)


def test_idle_threads_sleep():
    code = """
    import time
    x, weight = torch.randn(4, 512), pack_linear(torch.randn(2048, 512))
    linear(x, weight)
    time.sleep(0.05)
    used = time.process_time()
    time.sleep(0.5)
    print(time.process_time() - used < 0.05)
    """
    assert run(code, MEDUSA_NUM_THREADS="2") == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own memory as Linux does")
def test_memory_that_runs_out_in_a_launch_is_an_error_and_no_more():
    """Every thread fails to get its buffer; the launches that follow are as before, and shared again."""
    code = """
        import resource
        x, weight = torch.randn(2_000_000, 4), torch.randn(64, 4)
        some = linear(x[:5], weight)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (640 << 20), resource.RLIM_INFINITY))
        try:
            linear(x, weight)
        except MemoryError:
            print("refused")
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert torch.equal(linear(x[:5], weight), some)
        assert torch.equal(linear(x, weight)[:5], some)
    """
    assert run(code, MEDUSA_NUM_THREADS="2") == "refused"
