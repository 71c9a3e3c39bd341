"""What the modules that read and write files share: hub ids, JSON, whole files or none, and errors in one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CheckpointError

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a hub id, org/name. So has many a relative path: look for a file first."""
    return _HUB_ID.fullmatch(name) is not None


def read_json(path: Path, error: type[ValueError] = CheckpointError) -> dict[str, Any]:
    """The object in a JSON file. Raises `error` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise error(f"{path}: not readable as JSON ({fault}); download it again") from None
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def read_json_if_any(path: Path, error: type[ValueError] = CheckpointError) -> dict[str, Any]:
    """As `read_json`; {} where there is no such file."""
    return read_json(path, error) if path.is_file() else {}


def write_json(path: Path, content: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Replaces the file in one move."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` when the block ends: no reader and no interruption meets half a file.

    An error or Ctrl-C in the block leaves `path` as it was and nothing beside it. Its folder is made if there is none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def first_line(error: Exception) -> str:
    """What the error says, up to 160 characters of its first line; the name of its type if it says nothing."""
    text = str(error).strip() or type(error).__name__
    return f"{text.splitlines()[0]:.160}"
