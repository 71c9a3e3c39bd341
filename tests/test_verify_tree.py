"""verify_tree: every backend against a brute force in float64, in every mode; token ids, paths and lengths are exact.

A draw, a threshold or a sum only decides if nothing it is compared with lies within rounding, so `inputs` takes the
first of a fixed series of random inputs whose comparisons are all at least tolerances.GAP apart.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch

from medusa_kernels import Tree

from . import cases, oracles
from .backends import every_backend, matrix
from .cases import BF16, F16, F32, SHORT
from .tolerances import GAP

OP = "verify_tree"


@dataclass(frozen=True)
class Case:
    n: int = 16
    kind: str = "random"
    batch: int = 2
    vocab: int = 11
    modes: tuple[str, ...] = ("greedy",)  # repeated over the batch
    numbers: dict = field(default_factory=dict, hash=False)  # keyword -> one value, or a tuple: one per sequence
    dtype: torch.dtype = F32
    layout: str = "dense"
    own_trees: bool = False
    wider: int = 0  # max_depth beyond the tree's
    duplicates: bool = False
    masked: bool = False  # -inf at a third of the vocabulary
    spread: float = 1.5

    @property
    def work(self) -> int:
        return self.batch * self.n * self.vocab

    @property
    def draws(self) -> int:
        return self.n * sum(self.modes[b % len(self.modes)] != "greedy" for b in range(self.batch))

    def __str__(self) -> str:
        numbers = "".join(f"-{key}={str(value).replace(' ', '')}" for key, value in self.numbers.items())
        flags = "-own-trees" * self.own_trees + f"-wider{self.wider}" * bool(self.wider)
        flags += (
            "-duplicates" * self.duplicates + "-masked" * self.masked + f"-spread{self.spread:g}" * (self.spread != 1.5)
        )
        return (
            f"{'+'.join(self.modes)}-{self.kind}{self.n}-b{self.batch}-v{self.vocab}-{SHORT[self.dtype]}"
            f"-{self.layout}{numbers}{flags}"
        )


MODES = ("greedy", "typical", "lossless")
SAMPLED = ({}, {"temperature": 0.7}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.8})
LOOSE = {"posterior_threshold": 0.01, "posterior_alpha": 0.1}

CASES = [
    *(Case(modes=(m,), n=n, batch=1) for m in MODES for n in (1, 2, 3, 7, 31, 63, 64, 65, 128, 129, 256)),
    *(Case(modes=(m,), vocab=v) for m in MODES for v in (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 127, 1001)),
    *(Case(modes=(m,), kind=kind) for m in MODES for kind in ("chain", "star")),
    *(Case(modes=(m,), kind="chain", n=9, vocab=2, numbers=LOOSE) for m in MODES),
    *(Case(modes=(m,), dtype=d, vocab=40) for m in MODES for d in (BF16, F16)),
    *(Case(modes=(m,), numbers=n) for m in ("typical", "lossless") for n in SAMPLED),
    *(Case(modes=("typical",), numbers=LOOSE | n, vocab=v) for n in SAMPLED for v in (4, 11)),
    *(Case(modes=(m,), numbers={"temperature": 0.0}) for m in MODES),
    *(Case(modes=("lossless",), numbers={"top_k": k}) for k in (1, 11, 100)),
    *(Case(modes=("lossless",), numbers={"top_p": p}) for p in (1e-4, 0.3, 0.99)),
    *(Case(modes=(m,), batch=b, own_trees=own) for m in MODES for b in (1, 3, 5) for own in (False, True)),
    *(Case(modes=MODES, batch=b, numbers=n) for b in (3, 5) for n in ({}, {"temperature": 0.7, "top_p": 0.9})),
    Case(modes=MODES, batch=5, own_trees=True, numbers={
        "temperature": (0.0, 0.7, 1.3, 0.5, 0.0), "top_p": (1.0, 0.9, 0.7, 0.5, 0.3), "top_k": (0, 4, 0, 2, 9),
        "posterior_threshold": (0.09, 0.01, 0.3, 0.09, 0.0), "posterior_alpha": (0.3, 0.0, 1.0, 0.1, 0.5)}),
    Case(modes=("lossless", "typical"), batch=4, numbers={"temperature": (1.0, 0.0, 0.0, 1.0)}),
    *(Case(modes=(m,), wider=w) for m in MODES for w in (1, 20)),
    *(Case(modes=(m,), duplicates=True, vocab=v, numbers=n) for m in MODES for v in (3, 11) for n in ({}, LOOSE)),
    *(Case(modes=(m,), masked=True, vocab=v, numbers=n) for m in MODES for v in (11, 65) for n in ({}, {"top_p": 0.9})),
    *(Case(modes=(m,), spread=s) for m in MODES for s in (0.01, 20.0, 1e3)),
    *(Case(modes=MODES, batch=3, layout=layout, own_trees=True) for layout in ("gaps", "transposed", "expanded")),
    # Small trees: all that a backend with few draws to spend takes.
    *(Case(modes=(m,), n=5, numbers=n) for m in ("typical", "lossless") for n in SAMPLED),
    *(Case(modes=(m,), n=3, vocab=v) for m in ("typical", "lossless") for v in (1, 2, 15, 17, 127, 1001)),
    *(Case(modes=("lossless",), n=2, batch=1, vocab=9001, spread=3.0, numbers=n) for n in SAMPLED),
    *(Case(modes=(m,), n=4, dtype=d, vocab=40) for m in ("typical", "lossless") for d in (BF16, F16)),
    *(Case(modes=(m,), n=5, duplicates=True, vocab=3, numbers=LOOSE) for m in ("typical", "lossless")),
    *(Case(modes=(m,), n=5, masked=True, numbers={"top_p": 0.9}) for m in ("typical", "lossless")),
    *(Case(modes=(m,), n=5, spread=s) for m in ("typical", "lossless") for s in (0.01, 1e3)),
    *(Case(modes=MODES, n=5, batch=3, layout=layout, own_trees=True) for layout in ("gaps", "transposed", "expanded")),
    Case(modes=("lossless", "typical"), n=5, batch=4, numbers={"temperature": (1.0, 0.0, 0.0, 1.0)}),
]  # fmt: skip


def inputs(case: Case):
    for attempt in itertools.count():
        arguments, keywords, verdicts = _inputs(case, cases.generator(f"{case}/{attempt}"))
        if min(verdict.margin for verdict in verdicts) > GAP:
            return arguments, keywords, verdicts


def _inputs(case: Case, g: torch.Generator):
    logits = cases.normal((case.batch, case.n, case.vocab), case.dtype, g, case.spread)
    if case.masked:
        logits[..., torch.randperm(case.vocab, generator=g)[: case.vocab // 3]] = -torch.inf
    if case.layout == "expanded":
        logits = logits[:, :1].expand_as(logits)
    return posed(case, logits, g)


def posed(case: Case, logits: torch.Tensor, g: torch.Generator):
    """A call that judges trees by these logits: its arguments, its keywords and the right answers."""
    trees = [cases.tree_of(case.kind, case.n, g) for _ in range(case.batch if case.own_trees else 1)]
    parents = torch.stack([tree.parents for tree in trees])
    tokens = torch.stack([_tokens(case, trees[b % len(trees)], logits[b], g) for b in range(case.batch)])
    seed = torch.randint(-(2**63), 2**63 - 1, (case.batch,), generator=g)
    offset = torch.randint(0, 2**40, (case.batch,), generator=g)
    modes = [case.modes[b % len(case.modes)] for b in range(case.batch)]
    verdicts = []
    for b in range(case.batch):
        own = {key: value[b] if isinstance(value, tuple) else value for key, value in case.numbers.items()}
        own = {key.removeprefix("posterior_"): value for key, value in own.items()}
        verdicts.append(
            oracles.verify(
                logits[b], tokens[b].tolist(), parents[b % len(trees)].tolist(), modes[b], **own,
                seed=int(seed[b]), offset=int(offset[b]),
            )
        )  # fmt: skip
    if case.layout == "gaps":
        logits, tokens, parents = (cases.strided(t) for t in (logits, tokens, parents))
    elif case.layout == "transposed":
        logits, tokens = cases.transposed(logits), cases.transposed(tokens)
    keywords = {key: list(value) if isinstance(value, tuple) else value for key, value in case.numbers.items()}
    keywords |= {"mode": modes if len(case.modes) > 1 else modes[0], "seed": seed, "offset": offset}
    if case.wider:
        keywords["max_depth"] = max(tree.max_depth for tree in trees) + case.wider
    return (logits, tokens, parents if case.own_trees else parents[0]), keywords, verdicts


def _tokens(case: Case, tree: Tree, logits: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Each node's children carry its most probable tokens in a shuffled order: paths of some length are accepted."""
    tokens, used = [0], {}
    likely = torch.sort(logits.float(), descending=True, stable=True).indices.tolist()
    for node, parent in enumerate(tree.parents.tolist()):
        if node:
            width = 3 if case.duplicates else case.vocab
            rank = used.setdefault(parent, torch.randperm(min(width, 4), generator=g).tolist())
            position = sum(1 for p in tree.parents.tolist()[:node] if p == parent)
            tokens.append(likely[parent][rank[position % len(rank)] % case.vocab])
    return torch.tensor(tokens, dtype=torch.int32)


def check(case: Case, result, arguments, keywords, verdicts):
    accepted, length, token = result
    assert [t.dtype for t in result] == [torch.int32] * 3
    depth = max(len(v.path) for v in verdicts) - 1
    width = keywords["max_depth"] if case.wider else accepted.shape[1] - 1
    assert accepted.shape == (case.batch, width + 1)
    assert width >= depth
    for b, verdict in enumerate(verdicts):
        assert accepted[b].tolist() == verdict.path + [-1] * (width - verdict.accept_length)
        assert int(length[b]) == verdict.accept_length
        assert int(token[b]) == verdict.token


@matrix(OP, CASES)
def test_against_brute_force(backend, case):
    arguments, keywords, verdicts = inputs(case)
    check(case, backend.run(OP, *arguments, **keywords), arguments, keywords, verdicts)


def test_the_cases_accept_paths_of_many_lengths():
    lengths = {mode: set() for mode in MODES}
    for case in CASES:
        if case.n <= 64 and case.vocab <= 65:
            for b, verdict in enumerate(inputs(case)[2]):
                lengths[case.modes[b % len(case.modes)]].add(verdict.accept_length)
    assert all(found >= {0, 1, 2, 3} for found in lengths.values()), lengths


TREE = Tree.from_choices([[0], [1], [2], [0, 0], [1, 0], [2, 0]])  # nodes 1 2 3, and 4 5 6 below them
FLAT = torch.zeros(1, 7, 5)


def verdict(backend, logits, tokens, parents=TREE.parents, **keywords):
    tokens = torch.tensor([tokens], dtype=torch.int32)
    accepted, _, token = backend.run(OP, logits, tokens, parents, **keywords)
    return [node for node in accepted[0].tolist() if node >= 0], int(token)


@every_backend(OP)
def test_argmax_ties_take_the_lowest_token(backend):
    assert verdict(backend, FLAT, [0, 1, 0, 2, 0, 0, 0]) == ([0, 2, 5], 0)


@every_backend(OP)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=SHORT.get)
@pytest.mark.parametrize("vocab", [5, 300, 5000])
def test_argmax_tie_anywhere_in_the_vocabulary(backend, dtype, vocab):
    g = cases.generator(vocab)
    logits = cases.normal((1, 1, vocab), dtype, g)
    for _ in range(8):
        at = torch.randperm(vocab, generator=g)[:3]
        tied = logits.clone()
        tied[..., at] = 50.0
        assert verdict(backend, tied, [0], Tree.from_choices([]).parents)[1] == int(at.min())


@every_backend(OP)
def test_duplicate_siblings_greedy_takes_the_longest_then_the_lowest(backend):
    logits = torch.zeros(1, 7, 5)
    logits[..., 3] = 1.0
    assert verdict(backend, logits, [0, 3, 3, 3, 1, 1, 1]) == ([0, 1], 3)
    assert verdict(backend, logits, [0, 3, 3, 3, 1, 3, 3]) == ([0, 2, 5], 3)


@every_backend(OP)
def test_duplicate_siblings_lossless_takes_the_lowest(backend):
    logits = torch.full((1, 7, 5), -torch.inf)
    logits[..., 3] = 0.0
    assert verdict(backend, logits, [0, 3, 3, 3, 1, 3, 3], mode="lossless", seed=1) == ([0, 1], 3)


@every_backend(OP)
def test_duplicate_siblings_typical_takes_the_longest_then_the_likelier_then_the_lowest(backend):
    logits = torch.full((1, 7, 5), -torch.inf)
    logits[..., 3], logits[..., 4] = 1.0, 0.5
    keywords = {"mode": "typical", "seed": 1, "posterior_alpha": 0.1}
    assert verdict(backend, logits, [0, 3, 3, 3, 1, 1, 1], **keywords)[0] == [0, 1]
    assert verdict(backend, logits, [0, 3, 3, 3, 1, 4, 4], **keywords)[0] == [0, 2, 5]
    assert verdict(backend, logits, [0, 3, 3, 4, 4, 3, 3], **keywords)[0] == [0, 2, 5]
    assert verdict(backend, logits, [0, 4, 4, 3, 4, 4, 4], **keywords)[0] == [0, 3, 6]


@every_backend(OP)
@pytest.mark.parametrize("mode", ["typical", "lossless"])
def test_infinite_logits_draw_the_only_token(backend, mode):
    logits = torch.full((1, 7, 5), -torch.inf)
    logits[..., 2] = -1e4
    for seed in range(5):
        assert verdict(backend, logits, [0, 2, 1, 3, 2, 2, 2], mode=mode, seed=seed) == ([0, 1, 4], 2)


@every_backend(OP)
@pytest.mark.parametrize("vocab", [5, 700])
@pytest.mark.parametrize("mode", ["typical", "lossless"])
def test_a_logit_of_infinity_is_the_one_drawn(backend, mode, vocab):
    logits = torch.linspace(-1.0, 1.0, vocab).repeat(1, 2, 1)
    logits[..., vocab - 2] = torch.inf
    children = Tree.named("chain-1").parents
    for seed in range(3):
        assert verdict(backend, logits, [0, 0], children, mode=mode, seed=seed) == ([0], vocab - 2)


@every_backend(OP)
@pytest.mark.parametrize("vocab", [5, 40, 3000])
def test_greedy_takes_the_first_nan(backend, vocab):
    logits = torch.linspace(-1.0, 1.0, vocab).view(1, 1, -1)
    logits[..., [vocab // 3, vocab - 2]] = torch.nan
    assert verdict(backend, logits, [0], Tree.from_choices([]).parents) == ([0], vocab // 3)


@every_backend(OP)
@pytest.mark.parametrize("vocab", [5, 700])
@pytest.mark.parametrize("truncation", ["top_k", "top_p", "both"])
def test_truncation_keeps_the_lowest_of_equal_tokens(backend, vocab, truncation):
    """Logits of 0 and 1 by turns: what is kept are the two lowest odd tokens, which some seeds share out."""
    row = torch.arange(vocab).remainder(2) * 1.0
    odd, even = vocab // 2, vocab - vocab // 2
    p = 1.5 / (odd + even / torch.e)  # one and a half of the likelier tokens
    numbers = {"top_k": {"top_k": 2}, "top_p": {"top_p": p}, "both": {"top_k": 4, "top_p": 0.4}}[truncation]
    if vocab == 5 and truncation == "both":
        numbers = {"top_k": 2, "top_p": 0.9}
    seeds = 40 if backend.fast else 10
    drawn = backend.run(
        OP,
        row.expand(seeds, 1, vocab),
        torch.zeros(seeds, 1, dtype=torch.int32),
        Tree.from_choices([]).parents,
        mode="lossless",
        seed=torch.arange(seeds),
        **numbers,
    )[2]
    assert set(drawn.tolist()) == {1, 3}


@every_backend(OP)
@pytest.mark.parametrize(
    ("shares", "top_p", "kept"),
    [((1, 2, 3, 4), 0.9, 3), ((4, 3, 2, 1), 0.9, 3), ((3, 1, 4, 2), 0.7, 2), ((9, 7, 4), 0.8, 2), ((5, 3, 2), 0.5, 1)],
)
def test_a_set_that_reaches_top_p_but_for_rounding_is_enough(backend, shares, top_p, kept):
    """0.4 + 0.3 + 0.2 is 0.9, in whatever precision and order it is summed."""
    share = torch.tensor(shares, dtype=torch.float64) / sum(shares)
    logits = share.log().float().view(1, 1, -1).expand(48, -1, -1)
    alone = torch.zeros(48, 1, dtype=torch.int32), torch.tensor([-1], dtype=torch.int32)
    drawn = backend.run(OP, logits, *alone, mode="lossless", top_p=top_p, seed=torch.arange(48))[2]
    assert set(drawn.tolist()) == set(share.argsort(descending=True)[:kept].tolist())


@every_backend(OP)
@pytest.mark.parametrize("vocab", [2, 3, 5, 7, 10, 16, 19, 37, 49, 100, 139, 1021])
def test_typical_refuses_what_is_exactly_as_probable_as_the_threshold(backend, vocab):
    """P = exp(-H) = 1 / vocab where all logits are equal, and the paper accepts above it only."""
    arguments = torch.zeros(1, 2, vocab), torch.tensor([[0, 1]], dtype=torch.int32), Tree.named("chain-1").parents
    options = {"mode": "typical", "posterior_threshold": 1.0, "seed": 1}
    assert backend.run(OP, *arguments, **options, posterior_alpha=1.0)[1].tolist() == [0]
    assert backend.run(OP, *arguments, **options, posterior_alpha=0.999)[1].tolist() == [1]
    fixed = {**options, "posterior_alpha": 1e6}
    assert backend.run(OP, *arguments, **{**fixed, "posterior_threshold": 1 / vocab})[1].tolist() == [0]
    assert backend.run(OP, *arguments, **{**fixed, "posterior_threshold": 0.999 / vocab})[1].tolist() == [1]


@every_backend(OP)
def test_seeds_as_a_list_are_those_of_a_tensor(backend):
    arguments = FLAT.expand(2, -1, -1), torch.zeros(2, 7, dtype=torch.int32), TREE.parents
    runs = [backend.run(OP, *arguments, mode="lossless", seed=s) for s in ([3, -5], torch.tensor([3, -5]))]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@every_backend(OP)
def test_equal_weights_draw_the_stated_token(backend):
    """Sums of ones are exact: the token is floor(u · vocab), at every counter, whatever the tree."""
    for vocab in (4, 100, 1024):
        logits = torch.zeros(1, 1, vocab)
        for seed, offset in ((0, 0), (1, 7), (-1, 2**33), (2**63 - 1, 2**62), (-(2**63), 5)):
            u = oracles.uniform(seed, offset + 1)
            assert (u * vocab) % 1 > GAP
            drawn = verdict(
                backend, logits, [0], Tree.from_choices([]).parents, mode="lossless", seed=seed,
                offset=torch.tensor([offset]),
            )  # fmt: skip
            assert drawn == ([0], int(u * vocab))


@every_backend(OP)
def test_max_depth_of_a_lone_root(backend):
    tokens, parents = torch.zeros(2, 1, dtype=torch.int32), torch.tensor([-1], dtype=torch.int32)
    accepted, length, token = backend.run(OP, torch.eye(3)[:2].view(2, 1, 3), tokens, parents, max_depth=3)
    assert accepted.tolist() == [[0, -1, -1, -1]] * 2
    assert length.tolist() == [0, 0]
    assert token.tolist() == [0, 1]


@every_backend(OP)
@pytest.mark.parametrize("truncation", [{}, {"temperature": 0.8, "top_p": 0.9}, {"top_k": 3}], ids=str)
def test_seeded_lossless_medusa_equals_seeded_plain_sampling(backend, truncation):
    """A toy model whose logits depend on the last two tokens, decoded with random trees and with the root alone."""
    g = cases.generator("toy")
    model = cases.normal((6, 6, 6), F32, g, 1.5)
    seed = 12345

    def decode(tree: Tree, steps: int) -> list[int]:
        text = [1, 2]
        parents = tree.parents.tolist()
        while len(text) < steps:
            tokens, rows = [text[-1]], [model[text[-2], text[-1]]]
            for node in range(1, tree.num_nodes):
                tokens.append(int(torch.randint(6, (1,), generator=g)))
                rows.append(model[tokens[parents[node]], tokens[node]])
            accepted, length, token = backend.run(
                OP, torch.stack(rows)[None], torch.tensor([tokens], dtype=torch.int32), tree.parents,
                mode="lossless", seed=seed, offset=torch.tensor([len(text) - 1]), **truncation,
            )  # fmt: skip
            text += [tokens[node] for node in accepted[0, 1 : int(length[0]) + 1].tolist()] + [int(token[0])]
        return text[:steps]

    tree, tokens = (Tree.named("4x3x2"), 60) if backend.fast else (Tree.named("2x2"), 10)
    assert decode(tree, tokens) == decode(Tree.from_choices([]), tokens)


@every_backend(OP)
def test_no_seed_means_fresh_entropy(backend):
    drawn = {
        verdict(backend, torch.zeros(1, 1, 997), [0], Tree.from_choices([]).parents, mode="lossless")[1]
        for _ in range(8)
    }
    assert len(drawn) > 1
