"""`medusa train`: text, hidden rows, heads, their measured accuracy, and the loss curve, in one folder."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from .checkpoint import open_checkpoint
from .dataset import Conversation, read_shard, shard_paths
from .distill import Writer, add_hidden, write_conversations
from .heads_files import save_heads
from .model import Model
from .train import Trainer, TrainOptions


def run(
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
) -> dict:
    """Writes conversations into folder/text (or reads `data`), trains heads in folder/run, and saves them to
    folder/heads.

    Each part goes on where an earlier call with the same arguments stopped.

    Args:
        data: a shard, or a folder of shards; hidden rows that they lack are computed first.
        positions: answer tokens to let the model write; ignored with `data`.
        soft_labels: share of the base's own distribution in the target, against the token it chose.
        root: whether the heads are told the root.
        slots: conversations written at once.
        device: None is CUDA where there is one.

    Returns:
        {"heads": folder, "accuracy": [head][rank], "positions": trained on, "loss": of the last steps}.

    Raises:
        ValueError: an option, the checkpoint or the data is unusable; the message says why.
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
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    checkpoint = open_checkpoint(model)
    positions_limit = checkpoint.config.max_position_embeddings
    base = Model(checkpoint, backend="auto", device=where, dtype="bfloat16", max_positions=positions_limit)
    if data is None:
        data = folder / "text"
        if len(shard_paths(data)) * 10_000 < positions:
            write_conversations(Writer(base, checkpoint.tokenizer, slots), data, positions, seed)
    conversations = _read(data)
    if any(c.hidden is None for c in conversations):
        conversations = add_hidden(base, conversations)
    trainer = Trainer(folder / "run", options, base.lm_head_source, base.embedding.cpu(), conversations, where)
    losses: list[float] = []
    with tqdm(total=trainer.total_steps, initial=trainer.step, desc="train", unit="step", disable=None) as bar:

        def show(step: int, loss: float) -> None:
            losses.append(loss)
            bar.update()
            bar.set_postfix(loss=f"{statistics.fmean(losses[-50:]):.3f}", refresh=False)

        trainer.run(show)
    found = trainer.result()
    save_heads(folder / "heads", dataclasses.replace(found, base_model_name_or_path=model))
    curve = _curve(folder / "run" / "log.jsonl")
    (folder / "heads" / "loss.json").write_text(json.dumps(curve) + "\n", encoding="utf-8")
    plot_loss(curve, folder / "heads" / "loss.png")
    return {
        "heads": str(folder / "heads"),
        "accuracy": found.metadata["accuracy"],
        "positions": trainer.positions,
        "options": dataclasses.asdict(options),
        "loss": statistics.fmean(loss for _, loss in curve[-50:]),
    }


def _read(data: Path) -> list[Conversation]:
    paths = shard_paths(data) if data.is_dir() else [data]
    if not paths:
        raise ValueError(f"{data} holds no shard-*.safetensors to train on")
    return [conversation for path in paths for conversation in read_shard(path)]


def _curve(log: Path) -> list[tuple[int, float]]:
    """(step, loss) of a run's log; of a step that a resumed run repeated, the last."""
    rows = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
    return sorted({row["step"]: row["loss"] for row in rows if "loss" in row}.items())


def plot_loss(curve: list[tuple[int, float]], path: Path) -> None:
    """The loss of every step and its running mean, as a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the loss curve as PNG needs `pip install 'medusa-kernels[train]'`") from None
    steps, losses = zip(*curve, strict=True)
    window = max(1, len(losses) // 50)
    mean = [statistics.fmean(losses[max(0, i - window) : i + 1]) for i in range(len(losses))]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.8", linewidth=0.5)
    axes.plot(steps, mean, color="tab:blue")
    axes.set(xlabel="step", ylabel="loss (sum over the heads, each weighted)", title="Medusa head training")
    figure.savefig(path, dpi=120)
