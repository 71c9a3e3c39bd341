"""A worker reads on its command line what its parent wrote there."""

from __future__ import annotations

import dataclasses

from bench.gpu import harness, phases, worker


def test_a_worker_reads_what_its_parent_wrote(options, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(phases.PHASES, "quick", phases.Phase(lambda o: seen.append(o) or [], 1))
    options = dataclasses.replace(options, commit="abc")
    given = worker.arguments(options, "quick", tmp_path / "progress", 3)
    assert worker.main(given) == 0
    assert seen == [harness.Options(options.rows, tmp_path, options.deadline, commit="abc")]
