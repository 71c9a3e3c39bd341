"""From the `draft` option to a source of guesses."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .checkpoint import Checkpoint, open_checkpoint
from .draft import Drafter, MedusaDrafter
from .draft_model import ModelDrafter, first_layers_of
from .files import is_hub_id
from .heads import MedusaHeads
from .model import Model
from .prompt_lookup import PromptLookup
from .tokenizer import Tokenizer

_FIRST_LAYERS = re.compile(r"first-layers:(\d+)")
_OPTIONS = "'medusa', 'prompt-lookup', 'first-layers:N' or a draft model (a folder, a .gguf file or a hub id)"


def choose_drafter(
    draft: str | os.PathLike, model: Model, checkpoint: Checkpoint, heads: MedusaHeads | None, *, max_positions: int
) -> Drafter | None:
    """The source meant by `draft`; None for "medusa" without heads.

    A draft model runs on the target's backend and device, in its dtype.

    Raises:
        ValueError: no such source, too many layers, or a draft model whose tokens are not the target's.
    """
    name = check_word(draft)
    if name == "medusa":
        return None if heads is None else MedusaDrafter(model, heads)
    if name == "prompt-lookup":
        return PromptLookup()
    if layers := _FIRST_LAYERS.fullmatch(name):
        most = model.config.num_layers
        if not 1 <= int(layers[1]) <= most:
            raise ValueError(f"draft {name!r} asks for {layers[1]} layers; the model has 1 to {most}")
        return ModelDrafter(first_layers_of(model, int(layers[1])), first_layers=True)
    opened = open_checkpoint(name)
    _check_same_tokens(name, opened.tokenizer, checkpoint.tokenizer)
    return ModelDrafter(
        Model(opened, backend=model.backend, device=model.device, dtype=model.dtype_name, max_positions=max_positions)
    )


def check_word(draft: object) -> str:
    """`draft` as a str. Raises ValueError for what can be no source, whatever the model."""
    name = os.fspath(draft) if isinstance(draft, (str, os.PathLike)) else ""
    named = name in ("medusa", "prompt-lookup", "default") or _FIRST_LAYERS.fullmatch(name) or is_hub_id(name)
    if not named and not (name and Path(name).expanduser().exists()):
        raise ValueError(f"draft must be {_OPTIONS}, not {draft!r}")
    return name


def _check_same_tokens(name: str, draft: Tokenizer, target: Tokenizer) -> None:
    ours, theirs = draft.vocabulary(), target.vocabulary()
    if ours == theirs:
        return
    different = min((i, token) for token, i in (ours.items() ^ theirs.items()))
    raise ValueError(
        f"draft model {name!r} has another vocabulary than the model: {len(ours)} tokens against {len(theirs)}, "
        f"different at id {different[0]} ({different[1]!r}); a draft model must have the model's own tokenizer"
    )
