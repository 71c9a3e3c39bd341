"""Sources of guesses side by side: `medusa bench --drafts`."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from .benchmark import median, where
from .engine import Medusa
from .output import Output

Source = tuple[str, Medusa]


def compare_drafts(
    engine: Medusa, sources: Sequence[Source], prompts: list[str], *, prompt_set: str, max_new_tokens: int
) -> dict:
    """Decodes every prompt plainly and with each source in turn, so that a slow moment hits all.

    Args:
        engine: decodes plainly.
        sources: what each is called, and the engine that takes its guesses: `engine.with_draft(...)`.

    Returns:
        A results row. `plain_tokens_per_second` and each source's `tokens_per_second` and `speedup` are medians over
        the prompts, `steps` and `tokens_per_step` totals, `equal_texts` counts the prompts answered as plainly.
    """
    engines = [one for _, one in sources]
    for warm in engines:
        warm.generate(prompts[0], min(8, max_new_tokens))
    engine.generate(prompts[0], min(8, max_new_tokens), medusa=False)
    plain: list[Output] = []
    guessed: list[list[Output]] = [[] for _ in sources]
    for prompt in tqdm(prompts, desc="prompts", disable=None):
        plain.append(engine.generate(prompt, max_new_tokens, medusa=False))
        for one, outputs in zip(engines, guessed, strict=True):
            outputs.append(one.generate(prompt, max_new_tokens))
    return {
        "benchmark": "drafts",
        "prompts": prompt_set,
        "num_prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "backend": engine.backend,
        "dtype": engine.dtype,
        "plain_tokens_per_second": median(o.stats.tokens_per_second for o in plain if o.stats.steps),
        "sources": [
            {"draft": draft, **_describe(one, plain, outputs)}
            for (draft, one), outputs in zip(sources, guessed, strict=True)
        ],
        **where(engines[0].model.device),
    }


def _describe(engine: Medusa, plain: list[Output], outputs: list[Output]) -> dict:
    timed = [(p.stats, o.stats) for p, o in zip(plain, outputs, strict=True) if o.stats.steps]
    tree, steps = engine.tree(1), sum(o.steps for _, o in timed)
    return {
        "tree_nodes": tree.num_nodes,
        "tree_depth": tree.max_depth,
        "steps": steps,
        "tokens_per_step": sum(o.accepted for _, o in timed) / max(1, steps),
        "tokens_per_second": median(o.tokens_per_second for _, o in timed),
        "speedup": median(o.tokens_per_second / p.tokens_per_second for p, o in timed),
        "equal_texts": sum(p.token_ids == o.token_ids for p, o in zip(plain, outputs, strict=True)),
    }


def table(row: dict) -> str:
    count = row["num_prompts"]
    plain = {"draft": "none: plain decoding", "tree_nodes": 1, "tree_depth": 0, "steps": "", "tokens_per_step": 1.0}
    plain |= {"tokens_per_second": row["plain_tokens_per_second"], "speedup": 1.0, "equal_texts": count}
    line = "  {draft:<24.24} {tree_nodes:5} {tree_depth:5} {steps:6} {tokens_per_step:11.3f} {tokens_per_second:9.1f}"
    line += " {speedup:7.2f}x  {equal_texts} of {count}"
    lines = [
        f"{count} prompts ({row['prompts']}), {row['max_new_tokens']} new tokens each, "
        f"{row['device']}, {row['backend']} {row['dtype']}",
        f"  {'draft':<24} nodes depth  steps tokens/step  tokens/s  speedup  equal texts",
    ]
    lines += [line.format(**source, count=count) for source in (plain, *row["sources"])]
    return "\n".join(lines)
