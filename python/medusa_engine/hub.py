"""Models and heads on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from .errors import CheckpointError
from .files import first_line

_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")
_BINARIES = ("*.bin", "*.bin.index.json", "medusa_lm_head.pt")


def hub_folder(repo: str) -> Path:
    """The files of a repository's top folder, from the hub or its local cache: PyTorch's own binaries only where there
    are no safetensors.

    Raises:
        CheckpointError: without a network, or for a repository that does not exist or needs a login.
    """
    folder = _download(repo, _FILES)
    return folder if any(folder.glob("*.safetensors")) else _download(repo, (*_FILES, *_BINARIES))


def _download(repo: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # "*/*": copies in other formats live in subfolders and can be as large as the model.
        return Path(snapshot_download(repo, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except Exception as error:  # the hub client raises its own and its HTTP library's errors
        raise CheckpointError(
            f"{repo}: no such file or folder here, and the hub did not give it ({type(error).__name__}: "
            f"{first_line(error)}); check the name, the network and `hf auth login`, or download it elsewhere and pass "
            "its folder"
        ) from None
