"""A real generation, step by step, as one HTML page: `medusa trace` is this file's door, trace.html the page.

The steps are those of `Medusa.generate`; what they leave in the decoder is read between them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from medusa_kernels import Tree
from medusa_kernels.reference.sampling import kept_weights

from .decode import Decoder
from .draft import MedusaDraft
from .engine import Medusa
from .observe import Moment, moments
from .sampling import SamplingOptions
from .tokenizer import Tokenizer
from .tree_svg import layout, visible

# Why a node is or is not part of the text.
ROOT = "root"
ACCEPTED = "accepted"
OTHER = "other"  # the base model chose another token after its parent
THRESHOLD = "threshold"  # typical: the base model finds it too improbable
SHORTER = "shorter"  # typical: probable enough, but another branch won
UNREACHED = "unreached"  # its parent was not accepted


def record(
    engine: Medusa,
    prompt: str | list[int],
    max_new_tokens: int = 64,
    options: SamplingOptions | None = None,
    *,
    chat: bool = True,
) -> dict[str, Any]:
    """Generates and keeps everything that the page shows, as JSON-able values.

    Args:
        prompt, max_new_tokens, chat: as `Medusa.generate` takes them; one prompt.
        options: how tokens are chosen, one value each; None is greedy.

    Returns:
        prompt, text, token_ids, finish_reason, new_tokens, tokens_per_step and what was set; `labels`, token id -> how
        the page spells it; `trees`; `histogram`; `first`, the prefill's token; and `steps`. Probabilities in a step are
        per node: `draft` its head's, `base` the base model's after its parent, None where there is none, `choice` the
        token the base model takes after it, and `choice_probability`.
    """
    options = options or SamplingOptions()
    many, ids = engine.encode(prompt, chat)
    if many:
        raise ValueError("trace takes one prompt: a str or a flat list of token ids")
    steps: list[dict[str, Any]] = []
    trees: list[Tree] = []
    first = None
    with tqdm(total=max_new_tokens, unit="token", disable=None) as bar:
        for moment in moments(engine, ids, max_new_tokens, options):
            bar.update(len(moment.gained[0]))
            if first is None:
                first = {"text": moment.texts[0], "token": moment.gained[0][0]}
                continue
            tree = moment.decoder.step_tree(0)
            if tree not in trees:
                trees.append(tree)
            steps.append({"tree": trees.index(tree), **_step(moment, tree, options)})
    (transcript,) = moment.transcripts
    emitted = sum(len(step["tokens"]) + step["dropped"] for step in steps)
    used = {first["token"]} | {token for s in steps for token in (*s["tokens"], *s["nodes"], *s["choice"])}
    return {
        "prompt": prompt if isinstance(prompt, str) else engine.tokenizer.decode(prompt),
        "text": transcript.text,
        "token_ids": transcript.token_ids,
        "finish_reason": transcript.finish_reason,
        "new_tokens": len(transcript.token_ids),
        "tokens_per_step": emitted / len(steps) if steps else 1.0,
        "backend": engine.backend,
        "dtype": engine.dtype,
        "mode": options.mode,
        "temperature": options.temperature,
        "first": first,
        "trees": [_tree(tree) for tree in trees],
        "steps": steps,
        "labels": {token: label(engine.tokenizer, token) for token in sorted(used)},
        "histogram": histogram(steps, trees),
    }


def _tree(tree: Tree) -> dict[str, Any]:
    return {
        "parents": tree.parents.tolist(),
        "depths": tree.depths.tolist(),
        "ranks": tree.ranks.tolist(),
        "places": layout(tree),
        "visible": visible(tree),
    }


def _step(moment: Moment, tree: Tree, options: SamplingOptions) -> dict[str, Any]:
    decoder = moment.decoder
    tokens, parents = decoder.tree_tokens[0].tolist(), tree.parents.tolist()
    path = decoder.accepted_nodes[0, : int(decoder.accept_length[0]) + 1].tolist()
    emitted = [*(tokens[node] for node in path[1:]), int(decoder.next_token[0])]
    logits = decoder.logits[0].float().cpu()
    probabilities = base_probabilities(logits, options)
    choice = probabilities.argmax(dim=-1).tolist()
    for node, token in zip(path, emitted, strict=True):
        choice[node] = token
    base = [None, *probabilities[parents[1:], tokens[1:]].tolist()]
    floor = None
    if _samples(options) and options.mode == "typical":
        entropy = torch.special.entr(probabilities).sum(dim=-1)
        floor = torch.clamp(options.posterior_alpha * torch.exp(-entropy), max=options.posterior_threshold).tolist()
    return {
        "text": moment.texts[0],
        "tokens": moment.gained[0],
        "dropped": len(emitted) - len(moment.gained[0]),
        "path": path,
        "nodes": tokens,
        "why": reasons(parents, path, base, floor),
        "draft": _rounded(_draft_probabilities(decoder, tree)),
        "base": _rounded(base),
        "choice": choice,
        "choice_probability": _rounded(probabilities[range(len(choice)), choice].tolist()),
        "floor": floor and _rounded(floor),
    }


def _samples(options: SamplingOptions) -> bool:
    return options.mode != "greedy" and options.temperature > 0


def base_probabilities(logits: Tensor, options: SamplingOptions) -> Tensor:
    """fp32 (n, vocab): what a node's children are judged by, or for greedy decoding the model's own distribution."""
    if not _samples(options):
        return logits.softmax(dim=-1)
    if options.mode == "typical" or (options.top_p == 1 and not options.top_k):
        return (logits / options.temperature).softmax(dim=-1)
    kept = torch.stack([kept_weights(row, options.temperature, options.top_p, options.top_k) for row in logits])
    return kept / kept.sum(dim=-1, keepdim=True)


def reasons(
    parents: Sequence[int], path: Sequence[int], base: Sequence[float | None], floor: Sequence[float] | None
) -> list[str]:
    """Per node one of the words above. `floor` is per node what its children's probability had to exceed; None: they
    had to be the base model's own choice.
    """
    accepted, reached = set(path), set(path)
    why = [ROOT]
    for node, parent in enumerate(parents[1:], start=1):
        if node in accepted:
            why.append(ACCEPTED)
        elif parent not in reached:
            why.append(UNREACHED)
        elif floor is None:
            why.append(OTHER)
        elif base[node] > floor[parent]:
            reached.add(node)
            why.append(SHORTER)
        else:
            why.append(THRESHOLD)
    return why


def _draft_probabilities(decoder: Decoder, tree: Tree) -> list[float | None]:
    if not isinstance(decoder.draft, MedusaDraft):  # other sources give no probabilities
        return [None] * tree.num_nodes
    logprobs = decoder.draft.logprobs[0].cpu()
    return [None, *logprobs[tree.depths[1:].long() - 1, tree.ranks[1:].long()].exp().tolist()]


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    """Four significant digits: the page shows fewer."""
    return [None if value is None else float(f"{value:.4g}") for value in values]


def histogram(steps: Sequence[dict[str, Any]], trees: Sequence[Tree]) -> dict[str, Any]:
    """Acceptance by depth and by head.

    Returns:
        `accept_length`: per length, 0 up, in how many steps the accepted path had it. `heads`: per head, `tried`, in
        how many steps one of its guesses stood after the accepted path so far, and `ranks`: how often the guess of
        each rank, 0 up, was the accepted one.
    """
    depth = max((tree.max_depth for tree in trees), default=0)
    lengths = Counter(len(step["path"]) - 1 for step in steps)
    tried = [0] * depth
    accepted: list[Counter[int]] = [Counter() for _ in range(depth)]
    for step in steps:
        tree, path = trees[step["tree"]], step["path"]
        parents, ranks = set(tree.parents.tolist()), tree.ranks.tolist()
        for head in range(min(len(path), depth)):
            tried[head] += path[head] in parents
        for head, node in enumerate(path[1:]):
            accepted[head][ranks[node]] += 1
    return {
        "accept_length": [lengths[length] for length in range(depth + 1)],
        "heads": [
            {"tried": count, "ranks": [ranks[rank] for rank in range(max(ranks, default=-1) + 1)]}
            for count, ranks in zip(tried, accepted, strict=True)
        ],
    }


def label(tokenizer: Tokenizer, token: int) -> str:
    """How the page spells one token: spaces and line ends visible, its id where it is no whole character."""
    alone = tokenizer.decode([token], skip_special_tokens=False)
    # Some decoders drop a text's first space: what the token adds behind itself has it.
    text = tokenizer.decode([token, token], skip_special_tokens=False)[len(alone) :]
    if not text or "�" in text:
        return f"#{token}"
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def page(trace: dict[str, Any]) -> str:
    """The whole HTML page: it needs no other file and no network."""
    data = json.dumps(trace, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    template = files("medusa_engine").joinpath("trace.html").read_text(encoding="utf-8")
    # No text of a model may end the script element that holds the data.
    return template.replace("{{trace}}", data.replace("<", "\\u003c"))


def summary(trace: dict[str, Any]) -> dict[str, Any]:
    """What `medusa trace --json` says of a trace."""
    names = ("text", "finish_reason", "new_tokens", "tokens_per_step", "histogram")
    return {**{name: trace[name] for name in names}, "steps": len(trace["steps"])}
