"""bench.roofline: bytes and operations against bench.ops's own count, the limits, the turns, and the tables."""

from __future__ import annotations

import pytest
import torch

from bench import ops, roofline
from bench.roofline import lines, part_call, rounds
from bench.step_parts import DTYPES, INT8_SPEED, Limits, Part, step_parts, totals
from medusa_engine import Medusa
from medusa_engine.checkpoint import open_checkpoint
from medusa_engine.heads import MedusaHeads
from tests.engine.models import counting_folder, counting_heads_folder, random_folder

HEADS = MedusaHeads(torch.zeros(4, 1, 64, 64), None, None, torch.arange(40, dtype=torch.int32))


@pytest.fixture
def config():
    return open_checkpoint(random_folder("llama")).config


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(roofline, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(roofline, "PRODUCT", 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_move_and_compute_what_the_ops_do(config, dtype):
    """Beside activations, which stay in the caches, bench.ops counts the same tensors byte for byte."""
    storage = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[dtype]
    counted = 0
    for part in step_parts(config, HEADS, dtype, nodes=4, context=20):
        if not part.bytes or (part.op == "draft_heads" and dtype == "int8"):
            continue
        kv = torch.bfloat16 if dtype == "int8" and part.op == "tree_attention" else storage
        work = getattr(ops.Maker("cpu", kv), part.op)(**part.dims)
        assert part.operations == work.flops, part.name
        activations = 0
        if part.op == "linear":
            rows = part.dims["rows"]
            activations = 4 * rows * (part.dims["inputs"] + part.dims["outputs"])
            activations -= 4 * part.dims["outputs"] * (dtype == "int8")  # the scales
        elif part.op == "tree_attention":
            activations = 2 * 4 * part.dims["n"] * part.dims["heads"] * part.dims["head_dim"]
        assert part.bytes == work.bytes - activations, part.name
        counted += 1
    assert counted >= 6


def test_a_step_holds_every_weight_once(config):
    plain = step_parts(config, HEADS, "float32", nodes=1, context=20)
    weights = sum(p.bytes * p.calls for p in plain if p.op == "linear")
    checkpoint = open_checkpoint(random_folder("llama"))
    matrices = [checkpoint.shape(name) for name in checkpoint.names() if name != "model.embed_tokens.weight"]
    assert weights == sum(4 * s[0] * s[1] for s in matrices if len(s) == 2)
    assert not {"draft heads", "compaction"} & {p.name for p in plain}


def test_drafting_counts_where_there_is_a_tree(config):
    told = MedusaHeads(HEADS.block_weight, None, None, HEADS.token_map, torch.zeros(64, 64))
    names = [[p.name for p in step_parts(config, h, "int8", nodes=2, context=1)] for h in (HEADS, told, None)]
    assert [("draft heads" in n, "heads' root" in n) for n in names] == [(True, False), (True, True), (False, False)]


def test_limits(monkeypatch):
    monkeypatch.setitem(INT8_SPEED, roofline._C.cpu.isa(), 4)
    parts = [Part("a", "linear", {}, 2, bytes=100, operations=400), Part("b", "silu_mul", {}, 1, operations=100)]
    assert totals(parts) == (200, 900)
    assert Limits(bandwidth=10, speed=1e9).seconds(parts, "bfloat16") == 20
    assert Limits(bandwidth=1e9, speed=10).seconds(parts, "bfloat16") == 90
    assert Limits(bandwidth=1e9, speed=10).seconds(parts, "int8") == 30  # the linear layers four times as fast


def test_rounds_take_turns():
    turns = []
    calls = {"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}
    taken = rounds(calls, 2)
    assert turns == ["a", "b"] * 3
    assert {name: len(times) for name, times in taken.items()} == {"a": 2, "b": 2}
    turns.clear()
    taken = rounds(calls, 1, in_turn=2)
    assert turns == ["a"] * 3 + ["b"] * 3 + ["a"] * 3 + ["b"] * 3
    assert {name: len(times) for name, times in taken.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_part_runs_and_is_right(config, dtype):
    for part in step_parts(config, HEADS, dtype, nodes=4, context=20):
        part_call(part, dtype)()


def test_a_wrong_part_gets_no_time(monkeypatch, config):
    right = ops.call

    def call(op, variant, device, work):
        return (lambda: work.outputs[0].fill_(0.5)) if variant == "cpu" else right(op, variant, device, work)

    monkeypatch.setattr(ops, "call", call)
    part = next(p for p in step_parts(config, HEADS, "bfloat16", nodes=1, context=4) if p.op == "silu_mul")
    with pytest.raises(ValueError, match=r"SiLU x up \(silu_mul, bfloat16\): output 0 is off by"):
        part_call(part, "bfloat16")


def test_the_limits_come_from_the_same_rounds(monkeypatch):
    times = {"call": [3.0, 1.0, 2.0], "read": [2.0, 4.0, 8.0], "product": [0.5, 0.5, 9.0]}
    monkeypatch.setattr(roofline, "rounds", lambda calls, number, in_turn: {name: times[name] for name in calls})
    assert roofline.medians({"call": None}, 3) == (
        {"call": 2.0},
        Limits(bandwidth=(1 << 16) / 4, speed=2 * 16**3 / 0.5),
    )


def test_the_whole_run(monkeypatch, capsys, tmp_path):
    real = Medusa.from_pretrained
    monkeypatch.setattr(
        Medusa, "from_pretrained", lambda **options: real(counting_folder(), counting_heads_folder(), **options)
    )
    monkeypatch.setattr(roofline, "NEW_TOKENS", 8)
    monkeypatch.setattr(roofline, "prose", lambda engine, tokens: [1 + i % 40 for i in range(tokens)])
    output = tmp_path / "rows.jsonl"
    command = "--dtypes float32 --rounds 2 --nodes 1,4 --ops 1 --busy 1,4 --contexts 8,30 --step-context 16 --threads"
    before = torch.get_num_threads(), roofline._C.cpu.num_threads()
    try:
        roofline.main([*command.split(), "1", "--output", str(output)])
    finally:
        torch.set_num_threads(before[0])
        roofline._C.cpu.set_num_threads(before[1])
    row = roofline.json.loads(output.read_text())
    assert [s["nodes"] for s in row["steps"]] == [1, 4]
    assert row["steps"][0]["times_one_node"] == 1.0
    assert row["steps"][1]["bytes"] > row["steps"][0]["bytes"]
    assert all(s["python_percent"] > 0 for s in row["steps"])  # of two rounds of a tiny model: no more can be said
    assert [b["nodes"] for b in row["busy"]] == [1, 4]
    assert all(b["times_quiet"] == b["busy_us"] / b["quiet_us"] > 0 for b in row["busy"])
    assert [c["context"] for c in row["contexts"]] == [8, 30]
    assert [c["tokens_per_step"] > 1 for c in row["contexts"]] == [True, True]
    assert row["threads"] == 1
    text = "\n".join(lines(row))
    assert capsys.readouterr().out == text + "\n"
    for heading in ("ops of a step, 1 nodes", "whole step", "one core busy", "context   plain"):
        assert heading in text


def test_a_step_without_kernels_runs_none():
    engine = Medusa.from_pretrained(counting_folder(), counting_heads_folder(), dtype="float32", tree="chain-3")
    decoder = roofline.without_kernels(engine, engine.drafter, engine.tree(1), 32)
    decoder.cache.data.fill_(torch.nan)
    decoder._logits.fill_(torch.nan)
    assert decoder.step() == [[0]]
    assert decoder.cache.data.isnan().all()
    assert decoder._logits.isnan().all()
    assert engine.generate("a", 8).text == "bcdefghi"  # the engine's own launches are what they were


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dtypes", "fp8"], "no dtype 'fp8'; there are float32, bfloat16, int8"),
        (["--nodes", "1,x"], "must be whole numbers of at least 1 with commas between, not '1,x'"),
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
    ],
)
def test_bad_arguments(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        roofline.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
