"""Captured steps ahead of the host bring what steps in turn do: tokens, texts, ends and counts."""

import itertools

import pytest
import torch

from medusa_engine import Medusa, captured
from medusa_engine import engine as engine_room
from medusa_engine.captured import Cuda, Steps, StepsAhead
from medusa_engine.decode import Decoder
from medusa_engine.heads_files import save_heads
from medusa_engine.observe import moments
from medusa_engine.sampling import SamplingOptions
from medusa_kernels import Tree
from tests.engine.models import (
    FOLDER,
    PROMPTS,
    counting_folder,
    counting_heads,
    counting_heads_folder,
    fitted_heads,
    random_folder,
    token,
)
from tests.engine.stand_in_gpu import UNREAD, StandIn, Tape, native_launches_on_tape

RAGGED = ([7], *PROMPTS, list(range(70)), [3, 3, 3, 50, 51])
# What guesses ahead in a captured step.
SOURCES = {
    "tree": {"tree": 24},
    "dynamic tree": {"tree": "dynamic-12"},
    "first layers": {"draft": "first-layers:1", "tree": "chain-3"},
    "draft model": {"draft": "itself", "tree": "chain-3"},
    "told heads": {"tree": "4x2"},
}
SAMPLED = [
    {},
    {"mode": "lossless", "seed": 1, "temperature": 0.7},
    {"mode": "lossless", "seed": [5, 2**62, -3], "temperature": [1.3, 0.0, 0.4], "top_p": 0.9, "top_k": [0, 3, 50]},
    {},
    {"mode": ["greedy", "typical", "lossless"], "seed": 4, "posterior_threshold": [0.09, 0.3, 0.09]},
    {"mode": "typical", "seed": 4, "posterior_alpha": 0.7},
]


@pytest.fixture(autouse=True)
def on_tape():
    with native_launches_on_tape():
        yield


@pytest.fixture(scope="module")
def heads_folders():
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(random_folder(), dtype=torch.float32)
    heads = fitted_heads(model, PROMPTS, num_heads=4)
    told = type(heads)(heads.block_weight, None, heads.lm_head_weight, None, 0.01 * torch.ones(64, 64))
    folders = {}
    for name, each in (("heads", heads), ("told heads", told)):
        folders[name] = FOLDER / f"captured-{name}"
        save_heads(folders[name], each, dtype=torch.float32)
    return folders


@pytest.fixture
def load(heads_folders):
    def load(source: str = "tree", *, gpu: bool = False, **options) -> Medusa:
        options = {**SOURCES[source], **options}
        if options.get("draft") == "itself":
            options["draft"] = random_folder()
        heads = None if "draft" in options else heads_folders.get(source, heads_folders["heads"])
        return on_gpu(Medusa.from_pretrained(random_folder(), heads, dtype="float32", device="cpu", **options), gpu)

    return load


def on_gpu(engine: Medusa, gpu: bool = True) -> Medusa:
    engine._gpu = StandIn() if gpu else None
    return engine


def counting(*, gpu: bool, tree: str = "chain-4", **options) -> Medusa:
    heads = counting_heads_folder(4, patchy=True)
    return on_gpu(
        Medusa.from_pretrained(counting_folder(), heads, dtype="float32", device="cpu", tree=tree, **options), gpu
    )


def same(ours, theirs) -> None:
    for name in ("token_ids", "text", "finish_reason"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("new_tokens", "steps", "accepted", "tokens_per_step"):
        assert getattr(ours.stats, name) == getattr(theirs.stats, name)
        assert [getattr(s, name) for s in ours.stats.per_sequence] == [
            getattr(s, name) for s in theirs.stats.per_sequence
        ]


@pytest.fixture(params=[1, 2])
def lag(request, monkeypatch):
    monkeypatch.setattr(engine_room, "RUN_AHEAD", request.param)
    return request.param


@pytest.mark.parametrize("source", SOURCES)
def test_ragged_batches(load, source, lag):
    plain, gpu = load(source), load(source, gpu=True)
    assert (gpu.heads is not None and gpu.heads.root_weight is not None) == (source == "told heads")
    for prompts, medusa in ((RAGGED, True), (RAGGED[:2], True), (RAGGED[::-1], True), (RAGGED[:3], False)):
        same(gpu.generate(prompts, 24, medusa=medusa), plain.generate(prompts, 24, medusa=medusa))
    assert gpu._gpu.captured == 4  # a graph for each decoder, a decoder for each batch
    assert gpu.generate(RAGGED[0], 24).stats.tokens_per_step > 1


@pytest.mark.parametrize("source", ["tree", "dynamic tree", "draft model"])
def test_a_graph_serves_other_prompts_and_other_options(load, source, lag):
    """One decoder, two graphs: of a batch that is greedy and of one that samples."""
    plain, gpu = load(source), load(source, gpu=True)
    prompts = [RAGGED[i] for i in (1, 3, 6)]
    seen = set()
    for number, options in enumerate(SAMPLED + SAMPLED[::-1]):
        asked = prompts[number % 3 :] + prompts[: number % 3]
        theirs = plain.generate(asked, 20, **options)
        same(gpu.generate(asked, 20, **options), theirs)
        seen.add(str(theirs.token_ids))
    assert len(seen) >= 8
    assert gpu._gpu.captured == 2


def test_without_a_seed_every_call_draws_anew(load):
    gpu = load(gpu=True)
    texts = [tuple(gpu.generate([44, 44], 30, mode="lossless", temperature=3.0).token_ids) for _ in range(4)]
    assert len(set(texts)) == 4
    assert gpu._gpu.captured == 1


def test_every_end_at_every_length(lag):
    """EOS, stop strings and the limit, wherever they fall in a step."""
    plain, gpu = counting(gpu=False), counting(gpu=True)
    prompts = ["V", "a", "P", "G", "w", [token("V"), token("V")]]
    ends = set()
    for limit in (*range(1, 12), 30, 45):
        for stop in (None, "stop", ["IJ", "q", "e press"]):
            theirs = plain.generate(prompts, limit, stop=stop)
            same(gpu.generate(prompts, limit, stop=stop), theirs)
            ends |= set(theirs.finish_reason)
    assert ends == {"eos", "stop", "length"}
    for order in itertools.islice(itertools.permutations(prompts), 0, 720, 97):
        same(gpu.generate(order, 30, stop="stop"), plain.generate(order, 30, stop="stop"))
        same(gpu.generate(order, 30, ignore_eos=True), plain.generate(order, 30, ignore_eos=True))


def test_streams(lag):
    plain, gpu = counting(gpu=False), counting(gpu=True)
    for prompt, stop in itertools.product(["V", "a", "P", "w"], [None, "stop"]):
        assert list(gpu.stream(prompt, 30, stop=stop)) == list(plain.stream(prompt, 30, stop=stop))
    left, other = gpu.stream("a", 30), gpu.stream("P", 30)
    chunks = [next(left), next(other), next(left), next(other)]  # taking turns, then left alone
    assert [c.text for c in chunks[::2]] == [c.text for c in itertools.islice(plain.stream("a", 30), 2)]
    assert list(gpu.stream("a", 30)) == list(plain.stream("a", 30))


def test_a_step_is_read_while_the_next_are_under_way(lag):
    gpu = counting(gpu=True)
    out = gpu.generate("a", 40, ignore_eos=True)
    log = gpu._gpu.log
    assert log[: lag + 7] == ["send"] * (lag + 1) + ["wait", "send"] * 3
    assert log.count("wait") == out.stats.steps
    assert out.stats.steps <= gpu._gpu.sent <= out.stats.steps + lag


def test_no_step_is_launched_that_cannot_be_needed(lag):
    """A plain step brings one token: where nothing else ends the text, the host knows how many there will be."""
    gpu = counting(gpu=True)
    for limit in (1, 2, 3, 9):
        before = gpu._gpu.sent
        gpu.generate(["a", "b"], limit, medusa=False)
        assert gpu._gpu.sent - before == limit - 1


def test_run_ahead_never_leaves_its_rows(lag, monkeypatch):
    """A text that fills max_seqlen to its last row by whole chains, and a neighbour that goes on."""
    folder = FOLDER / "captured-heads-that-know-the-alphabet"
    save_heads(folder, counting_heads(4, lambda head, last: last < 30), dtype=torch.float32)
    options = {"dtype": "float32", "device": "cpu", "tree": "chain-4", "max_seqlen": 3 + 12}
    plain, gpu = (Medusa.from_pretrained(counting_folder(), folder, **options) for _ in range(2))
    on_gpu(gpu)
    most = []
    run = Decoder.run

    def watched(decoder: Decoder) -> None:
        if Tape.running is None:
            decoder.cache.data[:, :, :, int(decoder.cache.seqlens.max()) :] = torch.nan
        most.append(int(decoder.cache.seqlens.max()) + decoder.tree.num_nodes - decoder.cache.rows)
        run(decoder)

    # No graph: every step is watched.
    monkeypatch.setattr(gpu._gpu, "capture", lambda work: work)
    monkeypatch.setattr(Decoder, "run", watched)
    for order in ((0, 1), (1, 0)):
        prompts = [[[token("a")] * 3, [token("A")] * 3][i] for i in order]
        same(gpu.generate(prompts, 12), plain.generate(prompts, 12))
    assert -6 < max(most) <= 0


def bits(value: torch.Tensor) -> torch.Tensor:
    """What was never written may hold NaN, which equals nothing."""
    return value.flatten().view(torch.uint8)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("options", SAMPLED[:2], ids=["greedy", "lossless"])
def test_a_step_needs_no_host_and_a_capture_changes_nothing(load, source, options):
    engine = load(source)
    prompts = [list(p) for p in PROMPTS]
    decoder = engine._take_steps(len(prompts), 100, engine.tree(len(prompts)), True).decoder
    assert decoder.draft.capturable
    decoder.start(prompts, SamplingOptions(**options).acceptance(len(prompts), torch.device("cpu")))
    first = decoder.step()
    state = {name: value.clone() for name, value in tensors(decoder).items()}
    tape = Tape()
    with tape:
        decoder.run()
        decoder.retire(1)
    assert len(tape.calls) > 20
    same = {name: torch.equal(bits(value), bits(state[name])) for name, value in tensors(decoder).items()}
    assert same == dict.fromkeys(state, True)
    decoder.start(prompts, SamplingOptions(**options).acceptance(len(prompts), torch.device("cpu")))
    assert decoder.step() == first
    assert decoder.cache.seqlens.min() > 0
    second = Decoder(engine.model, engine.drafter, decoder.tree, batch=len(prompts), max_seqlen=100)
    second.start(prompts, SamplingOptions(**options).acceptance(len(prompts), torch.device("cpu")))
    second.step()
    tape.replay()
    assert decoder.emitted() == second.step()
    assert decoder.cache.seqlens[1] == 0


def tensors(decoder: Decoder) -> dict[str, torch.Tensor]:
    """What a decoder's step begins from."""
    found = {name: value for name, value in vars(decoder).items() if isinstance(value, torch.Tensor)}
    found |= {"cache": torch.nan_to_num(decoder.cache.data), "seqlens": decoder.cache.seqlens}
    return found | {f"draft {n}": v for n, v in vars(decoder.draft).items() if isinstance(v, torch.Tensor)}


def test_a_draft_that_needs_the_host_takes_its_steps_in_turn(load):
    for tree in ("chain-4", "root"):
        plain, gpu = load(draft="prompt-lookup", tree=tree), load(draft="prompt-lookup", tree=tree, gpu=True)
        same(gpu.generate(RAGGED, 24), plain.generate(RAGGED, 24))
        captured_too = tree == "root"  # where nothing is guessed
        assert isinstance(gpu._steps[True], StepsAhead) == captured_too
    engine = load(draft="prompt-lookup", tree="chain-4")
    decoder = engine._take_steps(1, 100, engine.tree(1), True).decoder
    decoder.start([[5, 5, 5]], None)
    with pytest.raises(AssertionError, match="needs the host inside a captured step"), Tape():
        decoder.run()


def test_moments_are_steps_in_turn_on_the_same_decoder():
    plain, gpu = counting(gpu=False), counting(gpu=True)
    ids = [[token("a")], [token("P")]]
    same(gpu.generate(ids, 30), plain.generate(ids, 30))
    decoder, sent = gpu._steps[True].decoder, gpu._gpu.sent
    for number, (ours, theirs) in enumerate(zip(moments(gpu, ids, 30), moments(plain, ids, 30), strict=True)):
        assert (ours.texts, ours.gained) == (theirs.texts, theirs.gained)
        assert number == 0 or torch.equal(ours.decoder.tree_tokens, theirs.decoder.tree_tokens)
        assert torch.equal(ours.decoder.cache.seqlens, theirs.decoder.cache.seqlens)
        assert ours.decoder is decoder
    assert gpu._gpu.sent == sent
    same(gpu.generate(ids, 30), plain.generate(ids, 30))
    assert gpu._steps[True].decoder is decoder
    assert gpu._gpu.captured == 1


def test_a_model_on_the_cpu_takes_its_steps_in_turn(load):
    engine = Medusa.from_pretrained(counting_folder(), counting_heads_folder(4), dtype="float32", device="cpu")
    assert Cuda.of(engine.model) is engine._gpu is None
    engine.generate("a", 8)
    assert type(engine._steps[True]) is Steps
    assert engine._steps[True].decoder.run_ahead == 0


def test_an_outcome_is_read_from_a_copy_alone():
    decoder = Decoder(counting(gpu=False).model, None, Tree.named("root"), batch=3, max_seqlen=20)
    decoder.start([[1], [2], [3]], None)
    decoder.step()
    outcome, copy = decoder.outcome, decoder.outcome.block.clone()
    outcome.block.fill_(UNREAD)
    for part in (decoder.tree_tokens, decoder.accepted_nodes, decoder.accept_length, decoder.next_token):
        assert (part == UNREAD).all()
        assert (part.data_ptr() - outcome.block.data_ptr()) % 256 == 0
    assert outcome.read(copy) == [[3], [4], [5]]


def test_the_real_graph_is_asked_for_as_torch_has_it(monkeypatch):
    """Captured on a stream of its own, one for all captures; replayed, copied and recorded on the current one of the
    model's device, whichever device is current.
    """
    calls, current = [], [0]

    def call(name: str, *details) -> None:
        calls.append((name, current[-1], *details))

    class Graph:
        def replay(self):
            call("replay")

    class Capture:
        def __init__(self, graph, *, stream, capture_error_mode):
            call(type(graph).__name__, stream, capture_error_mode)

        def __enter__(self):
            call("begin")

        def __exit__(self, *error):
            call("end")

    class Event:
        def record(self):
            call("record")

        def synchronize(self):
            call("synchronize")

    class Host:
        def copy_(self, tensor, non_blocking):
            call("copy", tensor, non_blocking)

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *error):
            current.pop()

    streams = itertools.count()
    for name, fake in {
        "CUDAGraph": Graph,
        "graph": Capture,
        "Event": Event,
        "Stream": lambda: f"side stream {next(streams)} of {current[-1]}",
        "device": Device,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    gpu = captured.Cuda(torch.device("cuda:1"))
    for _ in range(2):
        replay = gpu.capture(lambda: call("work"))
        graph = ("Graph", 1, "side stream 0 of 1", "thread_local")
        assert calls == [graph, ("begin", 1), ("work", 1), ("end", 1)]
        calls.clear()
    replay()
    wait = gpu.send("tensor", Host())
    wait()
    assert calls == [("replay", 1), ("copy", 1, "tensor", True), ("record", 1), ("synchronize", 0)]
    calls.clear()
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device, pin_memory: call("pinned", dtype, pin_memory))
    gpu.host_like(torch.zeros(2))
    assert calls == [("pinned", 1, torch.float32, True)]
    assert current == [0]
