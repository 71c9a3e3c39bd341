"""Steps: greedy Medusa is plain greedy, token for token and, on the CPU backend, logit for logit, for every tree."""

from functools import cache

import pytest
import torch

from medusa_engine import Medusa
from medusa_engine.decode import Decoder
from medusa_engine.draft import MedusaDrafter
from medusa_engine.heads import MedusaHeads
from medusa_engine.heads_files import load_heads, save_heads
from medusa_engine.sampling import SamplingOptions
from medusa_kernels import Tree
from tests.engine.models import (
    CLASSES,
    FOLDER,
    PROMPTS,
    counting_folder,
    counting_heads,
    counting_heads_folder,
    fitted_heads,
    random_folder,
    token,
)

LENGTH = 40
ACCURACY = [[0.6, 0.1, 0.05, 0.03], [0.4, 0.1, 0.05, 0.03], [0.3, 0.08, 0.04], [0.2, 0.05], [0.1]]
TREES = {
    "chain-1": "chain-1",
    "chain-5": "chain-5",
    "dense": "4x3x2",
    "wide": [[rank] for rank in range(59)],
    "two-ranks": [[0], [1], [1, 0], [1, 0, 2], [0, 3]],
    "unordered-no-rank-0": [[3], [2, 1], [2], [2, 1, 0]],
    **{f"searched-{n}": Tree.search(ACCURACY, n) for n in (2, 3, 17, 63, 64, 65, 100)},
    "medusa-7b-64": "medusa-7b-64",
}
# name -> heads, layers, bias, draft vocabulary
HEADS = {
    "1-head": (1, 1, True, None),
    "2-heads-2-layers": (2, 2, True, None),
    "3-heads-no-bias-map": (3, 1, False, 40),
    "4-heads-map": (4, 1, True, 32),
    "5-heads-no-layer": (5, 0, False, None),
    "5-heads": (5, 1, True, None),
}


@cache
def heads_folder(name: str, family: str = "llama"):
    import transformers

    count, layers, bias, draft_vocab = HEADS[name]
    model = transformers.AutoModelForCausalLM.from_pretrained(random_folder(family), dtype=torch.float32)
    heads = fitted_heads(model, PROMPTS, num_heads=count, layers=layers, bias=bias, draft_vocab=draft_vocab)
    folder = FOLDER / f"fitted-{family}-{name}"
    save_heads(folder, heads, dtype=torch.float32)
    return folder


@cache
def engine(heads: str = "5-heads", family: str = "llama", dtype: str = "float32", backend: str = "cpu") -> Medusa:
    return Medusa.from_pretrained(random_folder(family), heads_folder(heads, family), dtype=dtype, backend=backend)


def run(engine: Medusa, tree: Tree, prompts, *, heads: MedusaHeads | None = None, length: int = LENGTH):
    """Tokens of every prompt, the logits each but the first was chosen from, and all accept lengths."""
    drafter = MedusaDrafter(engine.model, heads) if heads is not None else engine.drafter
    # Sequences go on until the slowest is there.
    longest = max(map(len, prompts)) + (tree.max_depth + 1) * length
    decoder = Decoder(engine.model, drafter, tree, batch=len(prompts), max_seqlen=longest)
    decoder.cache.data.fill_(torch.nan)  # a row that is read before it is written shows
    tokens = [[t] for t in decoder.start([list(p) for p in prompts], None)]
    rows, lengths = [[] for _ in prompts], []
    while min(map(len, tokens)) < length:
        before = decoder.cache.seqlens.clone()
        emitted = decoder.step()
        assert torch.equal(decoder.cache.seqlens, before + decoder.accept_length + 1)
        lengths += decoder.accept_length.tolist()
        for b, gained in enumerate(emitted):
            path = decoder.accepted_nodes[b, : len(gained)].tolist()
            assert len(gained) == decoder.accept_length[b] + 1
            assert path[0] == 0
            assert [decoder.tree_tokens[b, node] for node in path] == [tokens[b][-1], *gained[:-1]]
            tokens[b] += gained
            rows[b] += decoder.logits[b, path].clone()
            assert gained == decoder.logits[b, path].argmax(-1).tolist()
    return [t[:length] for t in tokens], [torch.stack(r[: length - 1]) for r in rows], lengths


@cache
def plain(family: str, dtype: str, backend: str):
    return run(engine("5-heads", family, dtype, backend), Tree.named("root"), PROMPTS)


def check(engine: Medusa, family: str, tree: Tree, heads: MedusaHeads | None = None) -> list[int]:
    """The accept lengths of a run whose tokens and logits are plain decoding's."""
    expected, expected_rows, plain_lengths = plain(family, engine.dtype, engine.backend)
    tokens, rows, lengths = run(engine, tree, PROMPTS, heads=heads)
    assert set(plain_lengths) == {0}
    assert tokens == expected
    for ours, theirs in zip(rows, expected_rows, strict=True):
        if engine.backend == "cpu":
            assert torch.equal(ours, theirs)
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    return lengths


def as_tree(tree) -> Tree:
    return tree if isinstance(tree, Tree) else Tree.named(tree) if isinstance(tree, str) else Tree.from_choices(tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_any_tree_gives_the_plain_tokens_and_logits(tree, dtype):
    tree = as_tree(tree)
    lengths = check(engine(dtype=dtype), "llama", tree)
    assert max(lengths) <= tree.max_depth
    if [0] * min(3, tree.max_depth) in tree.choices:
        assert max(lengths) >= min(2, tree.max_depth)  # several tokens a step did happen
    assert min(lengths) < tree.max_depth or tree.max_depth < 4  # and so did heads that were wrong


@pytest.mark.parametrize("tree", ["chain-3", "4x3x2", "searched-17"])
def test_reference_gives_the_plain_tokens(tree):
    assert max(check(engine(backend="reference"), "llama", as_tree(TREES.get(tree, tree)))) >= 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", HEADS)
def test_any_heads_give_the_plain_tokens(heads, dtype):
    tree = Tree.search(ACCURACY, 30).prune(HEADS[heads][0])
    loaded = load_heads(heads_folder(heads))
    lengths = check(engine(dtype=dtype), "llama", tree, loaded)
    assert max(lengths) >= min(2, loaded.num_heads)


@pytest.mark.parametrize("family", [f for f in CLASSES if f != "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_family_gives_the_plain_tokens(family, dtype):
    assert max(check(engine("5-heads", family, dtype), family, Tree.search(ACCURACY, 24))) >= 2


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("shared", ["base", "own", "map"])
def test_heads_that_share_one_lm_head(shared, root):
    """The base's own LM head, another one for all heads, or the base's rows of a token map; told the root or not."""
    size, vocab = 64, 96
    generator = torch.Generator().manual_seed(0)
    weight = 0.2 * torch.randn(3, 1, size, size, generator=generator)
    lm_head = torch.randn(vocab, size, generator=generator) if shared == "own" else None
    token_map = torch.randperm(vocab, generator=generator)[:30].int() if shared == "map" else None
    root_weight = 0.2 * torch.randn(size, size, generator=generator) if root else None
    heads = MedusaHeads(weight, None, lm_head, token_map, root_weight)
    check(engine(), "llama", Tree.named("8x4x2"), heads)
    model = engine().model
    hidden, roots = torch.randn(2, size, generator=generator), torch.tensor([5, 71], dtype=torch.int32)
    draft_tokens, logprobs, draft = MedusaDrafter(model, heads).bind(hidden, roots, 8)
    draft()
    if root:
        embedded = model.embedding[roots.long()].float()
        hidden = hidden + embedded / (embedded.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() @ root_weight.T
    table = model.lm_head_source.float() if lm_head is None else lm_head
    table = table if token_map is None else table[token_map.long()]
    states = torch.stack([hidden + torch.nn.functional.silu(hidden @ w[0].T) for w in weight], dim=1)
    expected = (states @ table.T).log_softmax(-1).topk(8)
    ids = expected.indices if token_map is None else token_map[expected.indices]
    assert torch.equal(draft_tokens.long(), ids.long())
    assert torch.allclose(logprobs, expected.values, atol=1e-5)


def test_heads_read_the_last_accepted_row():
    """On a model and heads that know the whole text, every step takes the whole chain: one wrong row and none would."""
    counted = Medusa.from_pretrained(counting_folder(), counting_heads_folder(4), dtype="float32")
    _, _, lengths = run(counted, Tree.named("chain-4"), [[token("a")], [token("q"), token("b")]], length=60)
    assert set(lengths) == {4}
    patchy = Medusa.from_pretrained(counting_folder(), counting_heads_folder(4, patchy=True), dtype="float32")
    _, _, lengths = run(patchy, Tree.named("chain-4"), [[token("a")], [token("q"), token("b")]], length=60)
    assert set(lengths) == {0, 1, 2, 3, 4}
    _, _, lengths = run(patchy, Tree.named("2x2x2x2"), [[token("a")]], length=60)
    assert set(lengths) == {4}  # wrong guesses stand at rank 0, right ones at rank 1


def test_the_cache_holds_what_plain_decoding_writes():
    """After some steps every committed K/V row, all layers, is the one that plain decoding has there."""
    caches = []
    for tree in (Tree.named("root"), Tree.search(ACCURACY, 20)):
        decoder = Decoder(engine().model, engine().drafter, tree, batch=2, max_seqlen=100)
        decoder.start([PROMPTS[0], PROMPTS[2]], None)
        while decoder.cache.seqlens.min() < 40:
            decoder.step()
        caches.append(decoder.cache)
    (a, b) = caches
    for sequence in range(2):
        assert torch.equal(a.data[:, :, sequence, :40], b.data[:, :, sequence, :40])


def test_a_step_is_its_four_verbs():
    decoder = Decoder(engine().model, engine().drafter, Tree.named("chain-3"), batch=1, max_seqlen=64)
    decoder.start([PROMPTS[0]], None)
    expected = [decoder.step() for _ in range(4)]
    first = decoder.start([PROMPTS[0]], None)
    for tokens in expected:
        decoder.propose()
        assert decoder.tree_tokens[0, 0] == first[0]
        decoder.verify()
        decoder.accept()
        assert decoder.accept_length.tolist() == [len(tokens[0]) - 1]
        assert decoder.next_token.tolist() == first[:0] + tokens[0][-1:]
        decoder.compact()
        first = tokens[0][-1:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_greedy_step_on_the_cpu_writes_no_logits(dtype):
    """Who asks for them gets them, the same bits as where a sequence beside it samples and all are written."""
    made = []
    for options in (SamplingOptions(), SamplingOptions(mode=["greedy", "lossless"], seed=3)):
        decoder = Decoder(engine(dtype=dtype).model, engine().drafter, Tree.named("4x3x2"), batch=2, max_seqlen=80)
        decoder.start([PROMPTS[0]] * 2, options.acceptance(2, torch.device("cpu")))
        for _ in range(3):
            decoder._logits.fill_(torch.nan)
            decoder.step()
            assert decoder._logits.isnan().all() == (options.mode == "greedy")
        made.append(decoder.logits[0].clone())
        assert not decoder._logits.isnan().any()
    assert torch.equal(*made)


@pytest.mark.parametrize("tree", ["root", "chain-4", "4x3x2"])
def test_a_full_cache_is_never_left(tree):
    """Prompt + new tokens = max_seqlen, in a cache cut from a larger one: its borders stay as they are."""
    tree, prompt = Tree.named(tree), PROMPTS[2]
    expected, _, _ = run(engine(), Tree.named("root"), [prompt], length=20)
    decoder = Decoder(engine().model, engine().drafter, tree, batch=1, max_seqlen=len(prompt) + 20)
    tokens = decoder.start([prompt], None)
    while len(tokens) < 20:
        assert decoder.cache.seqlens[0] + tree.num_nodes <= decoder.cache.rows
        tokens += decoder.step()[0]
    assert tokens[:20] == expected[0]


def test_a_retired_sequence_stands_still():
    decoder = Decoder(engine().model, engine().drafter, Tree.named("chain-3"), batch=2, max_seqlen=80)
    decoder.start([PROMPTS[0], PROMPTS[2]], None)
    decoder.step()
    decoder.retire(0)
    for _ in range(6):
        before = decoder.cache.seqlens.tolist()
        decoder.step()
        assert decoder.cache.seqlens.tolist() == [0, before[1] + decoder.accept_length[1] + 1]
    decoder.start([PROMPTS[0], PROMPTS[2]], None)  # and is there again
    assert decoder.cache.seqlens.tolist() == [len(PROMPTS[0]), len(PROMPTS[2])]
    assert decoder.active.tolist() == [1, 1]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_ended_sequence_never_leaves_its_rows(order, monkeypatch):
    """One sequence overshoots the end of its rows while its neighbour goes on for long: the neighbour's rows stay."""
    heads = FOLDER / "heads-that-know-the-alphabet"
    save_heads(heads, counting_heads(4, lambda head, last: last < 30), dtype=torch.float32)
    tight = Medusa.from_pretrained(counting_folder(), heads, dtype="float32", tree="chain-4", max_seqlen=3 + 12)
    prompts = [[token("a")] * 3, [token("A")] * 3]
    alone = []
    for prompt in prompts:
        out = tight.generate(prompt, 12)
        alone.append((out, tight._steps[True].decoder.cache.data[:, :, 0, :14].clone()))
    assert [out.stats.steps for out, _ in alone] == [3, 11]
    seen = []
    step = Decoder.step

    def watched(decoder: Decoder) -> list[list[int]]:
        seen.append(decoder.cache.seqlens.tolist())
        assert all(length + 5 <= decoder.cache.rows for length in seen[-1])
        return step(decoder)

    monkeypatch.setattr(Decoder, "step", watched)
    out = tight.generate([prompts[i] for i in order], 12)
    assert len(seen) == 11
    assert out.token_ids == [alone[i][0].token_ids for i in order]
    slow = order.index(1)
    assert torch.equal(tight._steps[True].decoder.cache.data[:, :, slow, :14], alone[1][1])
    assert tight._steps[True].decoder.active[order.index(0)] == 0
