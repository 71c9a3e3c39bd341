"""Is it right? The build, small cases, whole decoding, the tests and the sanitizers."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from bench import ops
from medusa_engine.benchmark import installed_version
from medusa_engine.captured import RUN_AHEAD, Cuda, Steps, StepsAhead
from medusa_engine.decode import Decoder
from medusa_engine.draft import MedusaDrafter
from medusa_engine.model import Model
from medusa_kernels import Tree
from medusa_kernels._backends import _C, cuda_unavailable

from . import generating, geometry, small
from .generating import TINY
from .harness import Case, Options, python, run_until

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("triton", "transformers", "flashinfer-python", "numpy", "pybind11", "pytest")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
ENGINE_TESTS_NEED = ("gguf", "hypothesis")
WIDEST = ("tests/test_tree_attention.py", "tests/test_verify_tree.py", "tests/test_draft_heads.py", "tests/engine")


def quick(options: Options) -> list[Case]:
    listed = [Case("environment", environment), Case("build", build)]
    listed += [Case(name, functools.partial(checked, run)) for name, run in small.checks()]
    listed.append(Case("decoding", functools.partial(checked, decoding_differs)))
    listed.append(Case("bitwise decoding", functools.partial(checked, logits_differ)))
    ways = [("cuda", *source) for source in generating.SOURCES]
    for backend, draft, tree in [*ways, ("triton", *generating.SOURCES[0])]:
        made = functools.partial(generating.engine, device="cuda", backend=backend)
        run = functools.partial(generating.differs, made, draft, tree)
        listed.append(Case(f"generating {backend} {draft} {tree}", functools.partial(checked, run)))
    for draft, tree in generating.SOURCES:
        run = functools.partial(generating.waits_for_the_host, draft, tree)
        listed.append(Case(f"no wait in a step {draft} {tree}", functools.partial(checked, run)))
    return listed


def tests(options: Options) -> list[Case]:
    return [Case(f"tests on {name}", functools.partial(pytest, name, options)) for name in ("cuda", "triton")]


def sanitizers(options: Options) -> list[Case]:
    return [Case("sanitizers", functools.partial(sanitize, options))]


def checked(run: Callable[[], str]) -> Iterator[dict]:
    problem = run()
    yield {"benchmark": "check", "passed": not problem, "detail": problem}


def environment() -> Iterator[dict]:
    def said(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{type(error).__name__}"
        return done.stdout.strip() or done.stderr.strip()

    properties = torch.cuda.get_device_properties(0)
    release = re.search(r"release [\d.]+", said("nvcc", "--version"))
    yield {
        "benchmark": "environment",
        "gpu": properties.name,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": said("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,temperature.gpu", "--format=csv,noheader"),
        "sms": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "nvcc": release[0] if release else None,
        "compute_sanitizer": _sanitizer(),
        "cores": os.cpu_count(),
        "modules": {name: installed_version(name) for name in PACKAGES},
    }


def build() -> Iterator[dict]:
    yield {"benchmark": "check", "passed": not cuda_unavailable(), "detail": cuda_unavailable()}
    if cuda_unavailable():
        raise RuntimeError(cuda_unavailable())
    count, _ = _C.cuda_device_count()
    yield {"benchmark": "check", "passed": count == torch.cuda.device_count(), "detail": f"{count} devices"}


def decoding_differs(device: str = "cuda", steps: int = 40) -> str:
    """A small fp32 model: plain decoding, Medusa, and each replayed from a CUDA graph give the reference's tokens."""
    texts = {}
    for backend in ("reference", "cuda") if device == "cuda" else ("reference", "cpu"):
        checkpoint = geometry.RandomCheckpoint(TINY, "cpu")
        model = Model(checkpoint, backend=backend, device=torch.device(device), dtype="float32", max_positions=512)
        drafter = MedusaDrafter(model, geometry.random_heads(checkpoint, own_lm_heads=False))
        for name, tree in (("plain", Tree.from_choices([])), ("medusa", Tree.named("4x2x2"))):
            texts[f"{backend} {name}"] = _decoded(model, drafter, tree, steps, None)
            if gpu := Cuda.of(model):
                texts[f"{backend} {name} from a graph"] = _decoded(model, drafter, tree, steps, gpu)
    expected = texts["reference plain"]
    wrong = [name for name, text in texts.items() if text != expected]
    return f"other tokens than plain decoding by the reference: {', '.join(wrong)}" if wrong else ""


def logits_differ(device: str = "cuda", count: int = 40) -> str:
    """A small bf16 model, asked for it: the logits of Medusa's accepted nodes are plain decoding's, bit for bit."""
    checkpoint = geometry.RandomCheckpoint(TINY, "cpu")
    options = {"dtype": "bfloat16", "max_positions": 512, "bitwise": True}
    model = Model(checkpoint, backend=device, device=torch.device(device), **options)
    drafter = MedusaDrafter(model, geometry.random_heads(checkpoint, own_lm_heads=False))
    rows = []
    for tree in (Tree.from_choices([]), Tree.named("4x2x2")):
        decoder = Decoder(model, drafter, tree, batch=1, max_seqlen=400)
        decoder.start([list(range(100))], None)
        rows.append([])
        while len(rows[-1]) < count:
            decoder.step()
            rows[-1] += decoder.logits[0, decoder.accepted_nodes[0, : int(decoder.accept_length) + 1].long()].clone()
    wrong = sum(not torch.equal(a, b) for a, b in zip(*(r[:count] for r in rows), strict=True))
    return f"{wrong} of {count} rows of logits are not plain decoding's" if wrong else ""


def _decoded(model: Model, drafter: MedusaDrafter, tree: Tree, count: int, gpu: Cuda | None) -> list[list[int]]:
    """The first `count` tokens of two sequences, from graphs where `gpu` is given."""
    decoder = Decoder(model, drafter, tree, batch=2, max_seqlen=400, run_ahead=RUN_AHEAD)
    steps = StepsAhead(decoder, gpu) if gpu else Steps(decoder)
    texts = steps.start([[3, 1, 4, 1, 5], list(range(100))], None)
    while (least := min(map(len, texts))) < count:
        texts = [text + more for text, more in zip(texts, steps.next(count - least), strict=True)]
    return [text[:count] for text in texts]


def pytest(backend: str, options: Options) -> Iterator[dict]:
    """The matrix of every op on one backend, and whatever else names it: a process and a row for each file."""
    if importlib.util.find_spec("pytest") is None:
        yield {"benchmark": "skipped", "reason": "pytest is not installed"}
        return
    files = files_of_tests()
    if "tests/engine" not in files and backend == "cuda":
        reason = f"{' or '.join(ENGINE_TESTS_NEED)} is not installed"
        yield {"case": "tests on cuda: tests/engine", "benchmark": "skipped", "reason": reason}
    deadline = time.time() + options.seconds_left * (0.6 if backend == "cuda" else 1)
    log = options.logs / f"tests-{backend}.log"  # one for all: a remote machine may return few files
    log.unlink(missing_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(max(1, min(6, (os.cpu_count() or 1) // 2))) as pool,
    ):
        running = [pool.submit(tested, file, backend, deadline, Path(folder)) for file in files]
        for done in as_completed(running):
            row, output = done.result()
            with log.open("a", encoding="utf-8") as stream:
                stream.write(output)
            if row is not None:
                yield row


def files_of_tests() -> list[str]:
    """The widest first: they take longest."""
    files = [f"tests/test_{op}.py" for op in sorted({op for op, *_ in ops.CASES})]
    files += ["tests/test_backends.py", "tests/test_library_ops.py", "tests/test_cuda_invariance.py"]
    if all(map(importlib.util.find_spec, ENGINE_TESTS_NEED)):
        files.append("tests/engine")
    return sorted((file for file in files if (ROOT / file).exists()), key=lambda file: file not in WIDEST)


def tested(file: str, backend: str, deadline: float, folder: Path) -> tuple[dict | None, str]:
    """A row, or None where no test of the file names the backend, and what pytest said."""
    case = f"tests on {backend}: {file}"
    if time.time() > deadline:
        return {"case": case, "benchmark": "skipped", "reason": "out of time before it began"}, ""
    log = folder / file.replace("/", "-")
    command = python("-m", "pytest", file, "-k", backend, "-vv", "--tb=short", "-p", "no:cacheprovider")
    if importlib.util.find_spec("xdist") and file in WIDEST:
        command += ["-n", "4"]
    # As many processes as there are cores: threads of theirs would stand in each other's way.
    env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"}
    code = run_until([*command, f"--rootdir={ROOT}"], deadline, log=log, env=env)
    output = log.read_text(errors="replace")
    if code == 5:  # pytest: nothing was selected
        return None, output
    found = counted(output)
    ending = "killed: out of time" if code is None else " ".join(output.strip().splitlines()[-1:])
    detail = " ".join([ending, *found["failing"][:5]])
    return {"case": case, "benchmark": "check", "passed": code == 0, "detail": detail, **found}, output


# A line a test, of pytest itself and of its workers where xdist runs them.
OUTCOME = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
TOLD = re.compile(rf"(?P<test>\S+::.+?) (?P<said>{OUTCOME})\b")
TOLD_BY_WORKER = re.compile(rf"\[gw\d+\] \[ *\d+%\] (?P<said>{OUTCOME}) (?P<test>\S+::.+?)\s*$")


def counted(output: str) -> dict:
    """passed, failed and skipped of what pytest said so far, and the names of those that failed."""
    said: dict[str, set[str]] = {}
    for line in output.splitlines():
        if told := TOLD_BY_WORKER.match(line) or TOLD.match(line):
            said.setdefault(told["test"], set()).add(told["said"])
    failing = [test.split("::", 1)[1] for test, ways in said.items() if ways & {"FAILED", "ERROR", "XPASS"}]
    skipped = sum(ways <= {"SKIPPED", "XFAIL"} for ways in said.values())
    passed = len(said) - len(failing) - skipped
    return {"passed_tests": passed, "failed_tests": len(failing), "skipped_tests": skipped, "failing": failing}


def sanitize(options: Options) -> Iterator[dict]:
    """compute-sanitizer over the small cases, its tools beside each other: to start is most of what each does. Every
    allocation is its own, so that it is seen where each one ends.
    """
    executable = _sanitizer()
    if executable is None:
        yield {"benchmark": "skipped", "reason": "compute-sanitizer is not installed"}
        return
    with ThreadPoolExecutor(len(SANITIZERS)) as pool:
        running = {pool.submit(_sanitized, executable, tool, options): tool for tool in SANITIZERS}
        for done in as_completed(running):
            try:
                row = {"benchmark": "check", **done.result()}
            except Exception as error:  # the other tools have results of their own
                row = {"benchmark": "failure", "error": f"{type(error).__name__}: {error}"}
            yield {"case": running[done], **row}


def _sanitized(executable: str, tool: str, options: Options) -> dict:
    log = options.logs / f"{tool}.log"
    command = [executable, "--tool", tool, "--print-limit", "20", "--error-exitcode", "9"]
    if tool == "memcheck":  # PyTorch probes for what the driver may lack; our launchers report their own errors
        command += ["--report-api-errors", "no"]
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY", "PYTHONUNBUFFERED": "1"}
    code = run_until([*command, *python("-m", "bench.gpu.small")], options.deadline, log=log, env=env)
    return verdict(tool, code, log.read_text(errors="replace"))


def verdict(tool: str, code: int | None, output: str) -> dict:
    """What a sanitizer's output says: clean only if it reached its summary and the cases' results were right.

    Raises:
        RuntimeError: the tool did not run on this machine.
    """
    lines = [line.strip("= ") for line in output.splitlines()]
    if code is None:
        reached = [line for line in lines if re.match(r"\d+ of \d+: ", line)][-1:] or ["before its first case"]
        reports = [line.strip("= ") for line in output.splitlines() if re.match("=+ (?!COMPUTE-SANITIZER)", line)]
        return {"passed": False, "detail": " / ".join(["killed: out of time", *reached, *reports[:2]])}
    summaries = [line for line in lines if "SUMMARY:" in line]
    if "Device not supported" in output or not summaries:
        raise RuntimeError(f"{tool} did not run (exit status {code}): {' / '.join(lines[-3:])}")
    clean = re.search(r"SUMMARY: 0 (errors|hazards)", summaries[-1]) is not None
    return {"passed": clean and code == 0, "detail": f"{summaries[-1]}, exit status {code}"}


def _sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
