"""bench.quality: the texts, the reading against transformers, and the comparison."""

from __future__ import annotations

import math

import pytest
import torch

from bench import quality
from bench.quality import Reading, compare, docstrings, read, source, table, windows
from medusa_engine import Medusa
from tests.engine.models import random_folder


def test_texts_are_there():
    assert all(len(text) > 4000 for kind in quality.MODULES for text in quality.texts(kind))
    assert "def heappush" in quality.texts("code")[0]
    assert "def " not in quality.texts("prose")[0]


def test_docstrings_in_the_order_of_the_file_without_examples():
    code = '"""Top."""\ndef b():\n    """B.\n\n    >>> b()\n\n    More."""\nclass A:\n    "A."\n    def c(self): "C."\n'
    assert docstrings(code) == "Top.\n\nB.\n\nMore.\n\nA.\n\nC."


def test_a_module_without_source():
    with pytest.raises(ValueError, match="module 'sys' has no Python source here"):
        source("sys")


def test_windows():
    assert windows(range(7), 2, 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="the text has 7 tokens; 3 windows of 3 need 9"):
        windows(range(7), 3, 3)


@pytest.mark.parametrize("length", [70, 65, 64, 2])
def test_reading_is_that_of_transformers(length):
    """Whole chunks, a rest, a rest of one row, and less than a chunk."""
    from transformers import AutoModelForCausalLM

    engine = Medusa.from_pretrained(random_folder("llama"), backend="cpu", dtype="float32")
    ids = torch.randint(96, (2, length), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    reading = read(engine.model, ids)
    oracle = AutoModelForCausalLM.from_pretrained(random_folder("llama"), dtype=torch.float32).eval()
    with torch.no_grad():
        logits = oracle(ids.long()).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().long(), reduction="none")
    torch.testing.assert_close(reading.nll, nll.view(2, -1).double(), rtol=1e-4, atol=1e-4)
    assert torch.equal(reading.best, logits.argmax(-1))
    assert reading.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-4)


def reading(loss: float, *best: int) -> Reading:
    return Reading(torch.full((1, len(best)), loss, dtype=torch.float64), torch.tensor([best]))


def test_comparison_and_table():
    one = {"float32": reading(1.0, 1, 2, 3, 4), "bfloat16": reading(1.0, 1, 2, 3, 4), "int8": reading(1.1, 1, 2, 3, 5)}
    two = {dtype: reading(1.0, 1, 1, 1, 1) for dtype in quality.DTYPES}
    entries = {(e["text"], e["dtype"]): e for e in compare({"code": one, "prose": two})}
    assert list(entries)[-1] == ("all", "int8")
    assert entries["code", "int8"]["perplexity_over_bfloat16"] == pytest.approx(math.exp(0.1))
    assert entries["all", "int8"]["perplexity_over_float32"] == pytest.approx(math.exp(0.05))
    assert entries["code", "int8"]["agreement_with_bfloat16"] == 0.75
    assert entries["all", "int8"]["agreement_with_float32"] == 0.875
    assert entries["all", "int8"]["tokens"] == 8
    assert "perplexity_over_bfloat16" not in entries["all", "bfloat16"]
    lines = table(list(entries.values())).splitlines()
    assert len(lines) == 10
    assert lines[3].split() == ["code", "int8", "3.0042", "+10.52%", "+10.52%", "0.7500", "0.7500"]


@pytest.mark.parametrize(("loss", "code"), [(1.005, None), (1.02, 1)])
def test_the_bar(monkeypatch, capsys, tmp_path, loss, code):
    losses = {"float32": 1.0, "bfloat16": 1.0, "int8": loss}

    class Fake:
        def __init__(self, dtype):
            self.model = self.tokenizer = self
            self.dtype_name = dtype

        def encode(self, text):
            return list(range(5000))

    monkeypatch.setattr(quality.Medusa, "from_pretrained", lambda backend, dtype: Fake(dtype))
    monkeypatch.setattr(quality, "read", lambda model, rows: reading(losses[model.dtype_name], 1, 2))
    output = tmp_path / "rows.jsonl"
    try:
        quality.main(["--output", str(output)])
        stopped = None
    except SystemExit as stop:
        stopped = stop.code
    assert (stopped is None) == (code is None)
    if code:
        assert "int8's perplexity is +2.02% of bfloat16's" in stopped
    assert output.read_text().count('"benchmark": "quality"') == 1
    assert "prose  int8" in capsys.readouterr().out
