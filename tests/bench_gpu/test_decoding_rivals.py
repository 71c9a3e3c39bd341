"""Decoding by a real model is skipped where there is none."""

from __future__ import annotations

import dataclasses

from bench.gpu import decoding_rivals


def test_no_model_is_a_skip(options, tmp_path):
    (row,) = decoding_rivals.real(options)
    assert row == {"benchmark": "skipped", "reason": "no --model"}
    (row,) = decoding_rivals.real(dataclasses.replace(options, model=str(tmp_path / "none")))
    assert row["reason"].startswith("no model at")
