"""The errors a user's checkpoint can cause. Each message is one line: what was found, where, and what to do."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, incomplete, or of a kind that is not supported."""


class HeadsOnlyError(CheckpointError):
    """A folder that holds Medusa heads without the model they belong to.

    Attributes:
        base_model: the `base_model_name_or_path` its config.json names, or None.
    """

    def __init__(self, message: str, base_model: str | None):
        super().__init__(message)
        self.base_model = base_model


class ModelFetchError(RuntimeError):
    """The default model is not in the cache and could not be put there."""
