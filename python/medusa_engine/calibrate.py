"""`medusa calibrate`: how often the heads are right, what a step costs on this machine, and so the fastest tree."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from medusa_kernels import Tree

from . import calibration, machine
from .calibration import Calibration, Curve, best_nodes
from .dataset import Conversation, read_shard, write_shard
from .draft import MedusaDrafter
from .engine import DEFAULT_HEADS, Medusa
from .files import read_json_if_any, write_json
from .heads_files import is_heads_only
from .model import Model
from .observe import moments
from .step_times import step_samples
from .stepping import best_paths, tokens_per_step
from .train import MAX_PATHS, RANKS

NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CONTEXT = 256
PROMPTS_AT_ONCE = 16
ROWS_AT_ONCE = 32
# One number per head needs few positions, and each costs the whole draft vocabulary.
TEMPERATURE_POSITIONS = 1024
TEMPERATURES = torch.logspace(-1, 1, 33, base=4, dtype=torch.float64)


class Rows(NamedTuple):
    """Positions of all conversations, one after another.

    Attributes:
        hidden: bfloat16 (positions, hidden_size), the final-norm rows.
        root: int32 (positions,), the token that each row chose.
        right: int32 (positions, heads), the tokens the heads should guess; -1 past the conversation's end.
    """

    hidden: Tensor
    root: Tensor
    right: Tensor


def calibrate(
    engine: Medusa,
    prompts: Sequence[str],
    *,
    prompt_set: str = "chat",
    max_new_tokens: int = 128,
    batches: Sequence[int] = (1,),
    context: int | None = None,
    rounds: int = 15,
    label: str = "default",
) -> tuple[Path, Calibration]:
    """Measures the engine's heads and steps and writes what `tree="auto"` then reads.

    The model answers the prompts by plain greedy decoding; the heads are judged on its answers. Steps of every size in
    NODES are timed in turn. All but the times is deterministic. What an interrupted call had finished, answers, heads
    or batch sizes, the next one with the same arguments does not repeat; other batch sizes join those in the file.

    Args:
        prompts: at least 2; each goes through the chat template if there is one.
        prompt_set, label: what the prompts and the model are called in the file.
        batches: numbers of sequences that decode together.
        context: committed rows of each sequence while a step is timed; None: 256, or what max_seqlen allows.
        rounds: samples behind every median.

    Returns:
        The file and its content.

    Raises:
        ValueError: the engine has no heads, or an argument is not as above, before any work.
    """
    check(engine, prompts, max_new_tokens=max_new_tokens, batches=batches, context=context, rounds=rounds)
    context = context or min(CONTEXT, engine.max_seqlen - 1)
    drafter = MedusaDrafter(engine.model, engine.heads)
    path = calibration.locate(engine.model, drafter)
    ids = [engine.tokenizer.encode_prompt(prompt) for prompt in prompts]
    known = _readable(path)
    digest = hashlib.sha256(json.dumps([ids, max_new_tokens]).encode()).hexdigest()[:16]
    partial = path.with_name(f"{path.stem}-{digest}.partial")
    if known is None or known.about["text"] != digest:
        answers = _answers(engine, ids, max_new_tokens, partial)
        about = {
            "machine": machine.describe(engine.model.device),
            "backend": engine.backend,
            "dtype": engine.dtype,
            "model": label,
            "prompts": prompt_set,
            "text": digest,
            "conversations": len(answers),
            "positions": sum(len(c.answer) for c in answers),
        }
        known = _judge(engine.model, drafter, answers, about, {} if known is None else known.curves)
        calibration.write(path, known)
    timed = _Timed(partial / "timed.json", [context, rounds])
    for batch in batches:
        if batch in timed.batches:
            continue
        curve = _curve(engine.model, drafter, known, ids, batch=batch, context=context, rounds=rounds)
        today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
        about = {**known.about, "torch": torch.__version__, "date": today}
        known = dataclasses.replace(known, about=about, curves={**known.curves, batch: curve})
        calibration.write(path, known)
        timed.add(batch)
    shutil.rmtree(partial, ignore_errors=True)
    return path, known


def check(
    engine: Medusa,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batches: Sequence[int],
    context: int | None,
    rounds: int,
) -> None:
    """Raises the ValueError that `calibrate` raises for such arguments before any work."""
    if engine.heads is None:
        raise ValueError("this model has no Medusa heads to calibrate: name them with heads=... (--heads)")
    if len(prompts) < 2:
        raise ValueError(f"calibration needs at least 2 prompts, to judge a tree on other text, not {len(prompts)}")
    if context is not None and not 1 <= context < engine.max_seqlen:
        raise ValueError(f"context must be between 1 and {engine.max_seqlen - 1}, not {context}")
    if min(*batches, rounds, max_new_tokens) < 1:
        raise ValueError("batches, rounds and max_new_tokens must be at least 1")


def store_temperatures(folder: Path, temperatures: Sequence[float]) -> None:
    """Adds them to the config.json of a folder that `check_storable` let through: they go wherever the heads go."""
    config = folder / "config.json"
    content = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    write_json(config, {**content, "temperatures": list(temperatures)}, indent=2)


def check_storable(folder: str | None) -> Path:
    """The folder of heads whose config.json may take temperatures.

    Raises:
        ValueError: it is no folder of the user's own, or it holds a whole model, whose config.json says nothing of
            heads.
    """
    if folder is None or not Path(folder).is_dir():
        raise ValueError(f"temperatures can be stored with heads in a folder of your own, not with {folder!r}")
    if Path(folder).resolve() == DEFAULT_HEADS.resolve():
        raise ValueError("temperatures cannot be stored with the shipped heads: copy their folder and name it")
    if not is_heads_only(folder):
        raise ValueError(f"temperatures cannot be stored in {folder}: it holds a whole model, not heads alone")
    return Path(folder)


class _Timed:
    """The batch sizes that an interrupted call has timed already, in a file that goes when a call ends.

    Args:
        how: what else the times depend on; what was timed otherwise does not count.
    """

    def __init__(self, path: Path, how: list[int]):
        self._path, self._how = path, how
        found = read_json_if_any(path)
        self.batches: list[int] = found["batches"] if found.get("how") == how else []

    def add(self, batch: int) -> None:
        self.batches.append(batch)
        write_json(self._path, {"how": self._how, "batches": self.batches})


def _readable(path: Path) -> Calibration | None:
    try:
        return calibration.read(path)
    except ValueError:  # absent, or damaged: measured anew either way
        return None


# How often the heads are right


def _answers(engine: Medusa, ids: list[list[int]], max_new_tokens: int, partial: Path) -> list[Conversation]:
    """The model's greedy answers, a shard for every few prompts; shards that are there already are read."""
    answers: list[Conversation] = []
    with tqdm(total=len(ids), desc="answers", unit="prompt", disable=None) as bar:
        for start in range(0, len(ids), PROMPTS_AT_ONCE):
            part = ids[start : start + PROMPTS_AT_ONCE]
            shard = partial / f"shard-{start:04d}.safetensors"
            if not shard.exists():
                write_shard(shard, _write(engine, part, max_new_tokens))
            answers += read_shard(shard)
            bar.update(len(part))
    return answers


def _write(engine: Medusa, ids: list[list[int]], max_new_tokens: int) -> list[Conversation]:
    """One group of answers, with the hidden row that chose each token."""
    hidden: list[list[Tensor]] = [[] for _ in ids]
    for moment in moments(engine, ids, max_new_tokens, medusa=False):
        rows = moment.decoder.root_hidden.to("cpu", torch.bfloat16, copy=True)
        for kept, row, gained in zip(hidden, rows, moment.gained, strict=True):
            kept += [row] * len(gained)  # one token, or none once the answer has ended
    return [
        Conversation(torch.tensor(prompt + transcript.token_ids, dtype=torch.int32), len(prompt), torch.stack(rows))
        for prompt, transcript, rows in zip(ids, moment.transcripts, hidden, strict=True)
    ]


def _judge(
    model: Model, drafter: MedusaDrafter, answers: list[Conversation], about: dict, curves: dict[int, Curve]
) -> Calibration:
    """Ranks of the right tokens, and all that follows from them."""
    rows = _rows(answers, drafter.num_heads)
    top_k = min(RANKS, drafter.vocab_size)
    found = [_ranks(right, tokens) for right, tokens, _ in _drafts(model, drafter, rows, top_k, "ranks")]
    ranks = torch.cat(found)
    temperatures, log_loss = _temperatures(model, drafter, rows)
    counts = torch.stack([torch.bincount(column, minlength=RANKS + 1)[:RANKS] for column in ranks.T])
    accuracy = counts / (rows.right >= 0).sum(dim=0).clamp(min=1)[:, None]
    per_answer = [part.T for part in ranks.split([len(c.answer) for c in answers])]
    paths, speeds = _growth(per_answer, [p for p in drafter.paths or [] if max(p) < top_k and len(p) <= len(accuracy)])
    return Calibration(
        about=about,
        accuracy=[[round(p, 5) for p in row] for row in accuracy.tolist()],
        temperatures=temperatures,
        log_loss=log_loss,
        paths=[list(path) for path in paths],
        tokens_per_step=[round(speed, 5) for speed in speeds],
        curves=curves,
    )


def _rows(conversations: list[Conversation], num_heads: int) -> Rows:
    right = []
    for conversation in conversations:
        ahead = torch.nn.functional.pad(conversation.answer, (0, num_heads), value=-1)
        right.append(torch.stack([ahead[h + 1 :][: len(conversation.answer)] for h in range(num_heads)], dim=1))
    answers = [c.answer for c in conversations]
    return Rows(torch.cat([c.hidden for c in conversations]), torch.cat(answers), torch.cat(right))


def _drafts(
    model: Model, drafter: MedusaDrafter, rows: Rows, top_k: int, label: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A few rows at a time: right (rows, heads), draft_tokens and logprobs (rows, heads, top_k), on the CPU."""
    hidden = torch.zeros(ROWS_AT_ONCE, rows.hidden.shape[1], dtype=model.activation_dtype, device=model.device)
    root = torch.zeros(ROWS_AT_ONCE, dtype=torch.int32, device=model.device)
    draft_tokens, logprobs, draft = drafter.bind(hidden, root, top_k)
    parts = [range(len(rows.root))[at : at + ROWS_AT_ONCE] for at in range(0, len(rows.root), ROWS_AT_ONCE)]
    for part in tqdm(parts, desc=label, disable=None):
        at, count = slice(part.start, part.stop), len(part)
        hidden[:count].copy_(rows.hidden[at])
        root[:count].copy_(rows.root[at])
        draft()
        yield rows.right[at], draft_tokens[:count].cpu(), logprobs[:count].cpu()


def _ranks(right: Tensor, draft_tokens: Tensor) -> Tensor:
    """(rows, heads): where the right token stands among the guesses; RANKS where it is not among them."""
    hit = draft_tokens == right[:, :, None]
    return torch.where(hit.any(dim=2), hit.byte().argmax(dim=2), RANKS)


def _growth(ranks: Sequence[Tensor], listed: Sequence[Sequence[int]]) -> tuple[Sequence[Sequence[int]], list[float]]:
    """Paths, best first, and tokens per step with 1, 2, ... nodes: the paths that these ranks make, or those that the
    heads' checkpoint lists, which may come of more text. Both are judged on text that they were not made from.
    """
    own = best_paths(ranks, MAX_PATHS, absent=RANKS)
    most = min(max(NODES), len(own) + 1)
    speeds = held_out_tokens_per_step(ranks, most)
    listed_speeds = [tokens_per_step(ranks, listed[:n]) for n in range(min(max(NODES), len(listed) + 1))]
    gains = [theirs - ours for theirs, ours in zip(listed_speeds, speeds, strict=False)]  # at equal nodes
    return (listed, listed_speeds) if sum(gains) > 0 else (own, speeds)


def held_out_tokens_per_step(ranks: Sequence[Tensor], most: int) -> list[float]:
    """Tokens per step with the best trees of 1 to `most` nodes, each half of the conversations judging trees that the
    other half made: a tree looks better than it is on the text it was made from.

    Args:
        ranks: per conversation int (heads, positions), as `best_paths` takes them; at least 2.
    """
    halves = [list(ranks[0::2]), list(ranks[1::2])]
    paths = [best_paths(half, most - 1, absent=RANKS) for half in halves]
    positions = [sum(r.shape[1] for r in half) for half in halves]
    result = []
    for nodes in range(1, most + 1):
        judged = zip(positions, halves, reversed(paths), strict=True)
        steps = sum(count / tokens_per_step(half, others[: nodes - 1]) for count, half, others in judged)
        result.append(sum(positions) / steps)
    return result


def _temperatures(model: Model, drafter: MedusaDrafter, rows: Rows) -> tuple[list[float], list[list[float]]]:
    """Per head, the temperature that gives the right tokens the highest likelihood over the draft vocabulary, and their
    log loss [at 1, at that temperature]. Tokens outside that vocabulary do not count.
    """
    stride = -(-len(rows.root) // TEMPERATURE_POSITIONS)
    some = Rows(*(column[::stride].contiguous() for column in rows))
    losses = torch.zeros(drafter.num_heads, len(TEMPERATURES), dtype=torch.float64)
    counts = torch.zeros(drafter.num_heads, 1, dtype=torch.float64)
    for right, tokens, logprobs in _drafts(model, drafter, some, drafter.vocab_size, "temperatures"):
        hit = tokens == right[:, :, None]
        known = hit.any(dim=2)
        logprob = logprobs.masked_fill(~hit, 0).sum(dim=2)
        for i, temperature in enumerate(TEMPERATURES.tolist()):
            loss = (logprobs / temperature).logsumexp(dim=2) - logprob / temperature
            losses[:, i] += loss.masked_fill(~known, 0).double().sum(dim=0)
        counts[:, 0] += known.sum(dim=0)
    losses /= counts.clamp(min=1)
    fitted = [_lowest(row) for row in losses]
    unscaled = losses[:, len(TEMPERATURES) // 2].tolist()
    pairs = [[round(before, 4), round(after, 4)] for before, (_, after) in zip(unscaled, fitted, strict=True)]
    return [round(temperature, 3) for temperature, _ in fitted], pairs


def _lowest(losses: Tensor) -> tuple[float, float]:
    """The temperature, and the loss there, at the lowest point of the parabola through the lowest three losses, over
    the temperature's logarithm; 1 where nothing was measured.
    """
    if not losses.any():
        return 1.0, 0.0
    at = int(losses.argmin())
    if at in (0, len(losses) - 1):
        return float(TEMPERATURES[at]), float(losses[at])
    before, here, after = losses[at - 1 : at + 2].tolist()
    shift = 0.5 * (before - after) / (before - 2 * here + after)
    return float(TEMPERATURES[at] * (TEMPERATURES[1] / TEMPERATURES[0]) ** shift), here - (before - after) * shift / 4


# What a step costs


def _curve(
    model: Model,
    drafter: MedusaDrafter,
    known: Calibration,
    ids: list[list[int]],
    *,
    batch: int,
    context: int,
    rounds: int,
) -> Curve:
    """Times NODES, then whatever the curve says is best between them, until the best is a tree that was timed."""
    prompt = list(islice(cycle(token for one in ids for token in one), context))

    def samples(counts: Sequence[int]) -> dict[int, list[float]]:
        trees = [Tree.from_choices(known.paths[: n - 1]) for n in counts]
        return step_samples(model, drafter, trees, [prompt] * batch, rounds)

    taken = samples([n for n in NODES if n <= len(known.tokens_per_step)])
    medians = {nodes: statistics.median(times) for nodes, times in taken.items()}
    curve = Curve(context, rounds, round(max(map(_spread, taken.values())), 3), medians)
    while (best := best_nodes(known.tokens_per_step, curve)) not in curve.step_seconds:
        again = {nodes: statistics.median(times) for nodes, times in samples([1, best]).items()}
        step_seconds = {**curve.step_seconds, best: curve.seconds(1) * again[best] / again[1]}
        curve = dataclasses.replace(curve, step_seconds=dict(sorted(step_seconds.items())))
    return curve


def _spread(times: Sequence[float]) -> float:
    """The middle half's width, as a share of the median."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle
