"""`medusa train`: text, hidden rows, heads, their measured accuracy, and the loss curve, in one folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from .calibration_report import has_matplotlib
from .checkpoint import open_checkpoint
from .config import ModelConfig
from .dataset import Conversation, read_shard, shard_paths
from .distill import Writer, add_hidden, is_complete, write_conversations
from .files import read_json_if_any, write_json
from .heads_files import save_heads
from .machine import choose_device
from .model import Model
from .train import LEAST_CONVERSATIONS, Trainer, TrainOptions, check_torch, saved_state, split

MODEL_FILE = "model.json"  # in the folder: whose text it holds


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """What is decided before any work; see `prepare`.

    Attributes:
        writer: None where all text is there. given: the conversations that the user named, or None.
        draws: whether the loss curve can be drawn.
    """

    folder: Path
    options: TrainOptions
    model: str
    base: Model
    writer: Writer | None
    given: list[Conversation] | None
    positions: int
    draws: bool


def prepare(
    folder: Path,
    *,
    model: str = "default",
    data: Path | None = None,
    positions: int = 1_000_000,
    num_heads: int = 4,
    num_layers: int = 2,
    draft_vocab: int = 8192,
    epochs: int = 2,
    batch: int = 1024,
    learning_rate: float = 1e-2,
    weight_decay: float = 0.0,
    soft_labels: float = 0.5,
    root: bool = True,
    slots: int = 128,
    device: str | None = None,
    seed: int = 0,
) -> TrainingRun:
    """Loads what `run` needs, and refuses before hours of work what would end them.

    Args:
        folder: of the run; made when missing.
        data: a shard, or a folder of shards; hidden rows that they lack are computed first.
        positions: answer tokens to let the model write; ignored with `data`.
        soft_labels: share of the base's own distribution in the target, against the token it chose.
        root: whether the heads are told the root.
        slots: conversations written at once.
        device: None is CUDA where there is one.

    Raises:
        ValueError: an option, the folder, the checkpoint or the data is unusable; the message says why.
    """
    options = TrainOptions(
        heads=num_heads,
        layers=num_layers,
        draft_vocab=draft_vocab,
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        soft_labels=soft_labels,
        root=root,
        seed=seed,
    )
    check_torch()
    draws = has_matplotlib(required=False)
    where = choose_device(device, "auto")
    _check_writable(folder)
    saved_state(folder / "run", options, mmap=True)
    given = None if data is None else _read(data)
    checkpoint = open_checkpoint(model)
    if given is not None:
        _check_data(given, checkpoint.config, data)
    positions_limit = checkpoint.config.max_position_embeddings
    base = Model(checkpoint, backend="auto", device=where, dtype="bfloat16", max_positions=positions_limit)
    _check_model(folder, base)
    writes = data is None and not is_complete(folder / "text", positions)
    writer = Writer(base, checkpoint.tokenizer, slots) if writes else None
    return TrainingRun(folder, options, model, base, writer, given, positions, draws)


def run(prepared: TrainingRun) -> dict:
    """Writes conversations into folder/text (or takes those given), trains heads in folder/run, and saves them to
    folder/heads.

    Each part goes on where an earlier call with the same arguments stopped; on more or other text, training begins
    anew.

    Returns:
        {"heads": folder, "accuracy": [head][rank], "positions": trained on, "options": of the training, "loss": of the
        last steps}.
    """
    folder, base = prepared.folder, prepared.base
    write_json(folder / MODEL_FILE, {"model": prepared.model, "digest": base.digest})
    if prepared.writer is not None:
        write_conversations(prepared.writer, folder / "text", prepared.positions, prepared.options.seed)
    conversations = _read(folder / "text") if prepared.given is None else prepared.given
    if any(c.hidden is None for c in conversations):
        conversations = add_hidden(base, conversations)
    head, embedding = base.lm_head_source, base.embedding.cpu()
    trainer = Trainer(folder / "run", prepared.options, head, embedding, conversations, base.device)
    if trainer.begins_anew:
        tqdm.write(f"{folder / 'run'} is of another text: training begins anew", file=sys.stderr)
    losses: list[float] = []
    with tqdm(total=trainer.total_steps, initial=trainer.step, desc="train", unit="step", disable=None) as bar:

        def show(step: int, loss: float) -> None:
            losses.append(loss)
            bar.update()
            bar.set_postfix(loss=f"{statistics.fmean(losses[-50:]):.3f}", refresh=False)

        trainer.run(show)
    found = trainer.result()
    save_heads(folder / "heads", dataclasses.replace(found, base_model_name_or_path=_lasting(prepared.model)))
    curve = _curve(folder / "run" / "log.jsonl")
    (folder / "heads" / "loss.json").write_text(json.dumps(curve) + "\n", encoding="utf-8")
    if prepared.draws:
        plot_loss(curve, folder / "heads" / "loss.png")
    return {
        "heads": str(folder / "heads"),
        "accuracy": found.metadata["accuracy"],
        "positions": trainer.positions,
        "options": dataclasses.asdict(prepared.options),
        "loss": statistics.fmean(loss for _, loss in curve[-50:]),
    }


def _check_writable(folder: Path) -> None:
    """Makes the folder, and writes to it and to those of its parts that are there."""
    for part in (folder, folder / "text", folder / "run", folder / "heads"):
        try:
            if part == folder:
                part.mkdir(parents=True, exist_ok=True)
            if part.exists():
                tempfile.TemporaryFile(dir=part).close()
        except OSError as error:
            raise ValueError(f"{part} cannot be written to as a folder: {error.strerror}") from None


def _check_model(folder: Path, base: Model) -> None:
    """Text and hidden rows are one model's: another's heads would be trained on them without a word."""
    found = read_json_if_any(folder / MODEL_FILE, ValueError)
    if found and found.get("digest") != base.digest:
        raise ValueError(f"{folder} is of another model, {found.get('model')!r}: use another folder")


def _lasting(model: str) -> str:
    """A model's name that is its own from everywhere: of a path, the absolute one."""
    path = Path(model).expanduser()
    return str(path.resolve()) if model != "default" and path.exists() else model


def _check_data(conversations: list[Conversation], config: ModelConfig, data: Path) -> None:
    if len(conversations) < LEAST_CONVERSATIONS:
        raise ValueError(f"{data} holds {len(conversations)} conversation; training needs {LEAST_CONVERSATIONS}")
    if all(len(c.answer) < 2 for c in split(conversations)[0]):
        raise ValueError(f"{data} holds no answer of two tokens to train on: nothing follows a lone one")
    for conversation in conversations:
        highest = int(conversation.ids.max())
        if highest >= config.vocab_size:
            raise ValueError(
                f"{data} holds token id {highest}, and the model's are below {config.vocab_size}: it is another model's"
            )
        if conversation.hidden is None and len(conversation.ids) > config.max_position_embeddings:
            raise ValueError(
                f"{data} holds a conversation of {len(conversation.ids)} tokens; "
                f"the model takes {config.max_position_embeddings}"
            )
        if conversation.hidden is not None and conversation.hidden.shape[1] != config.hidden_size:
            raise ValueError(
                f"{data} holds hidden rows of {conversation.hidden.shape[1]} numbers, and the model's are of "
                f"{config.hidden_size}: it is another model's"
            )


def _read(data: Path) -> list[Conversation]:
    paths = shard_paths(data) if data.is_dir() else [data]
    if not paths:
        raise ValueError(f"{data} holds no shard-*.safetensors to train on")
    return [conversation for path in paths for conversation in read_shard(path)]


def _curve(log: Path) -> list[tuple[int, float]]:
    """(step, loss) of a run's log; of a step that a resumed run repeated, the last. A line that a full disk cut short
    is passed over.
    """
    losses: dict[int, float] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
            row = json.loads(line)
            losses[row["step"]] = row["loss"]
    return sorted(losses.items())


def plot_loss(curve: list[tuple[int, float]], path: Path) -> None:
    """The loss of every step and its running mean, as a PNG."""
    from matplotlib.figure import Figure

    steps, losses = zip(*curve, strict=True)
    window = max(1, len(losses) // 50)
    mean = [statistics.fmean(losses[max(0, i - window) : i + 1]) for i in range(len(losses))]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.8", linewidth=0.5)
    axes.plot(steps, mean, color="tab:blue")
    axes.set(xlabel="step", ylabel="loss (sum over the heads, each weighted)", title="Medusa head training")
    figure.savefig(path, dpi=120)
