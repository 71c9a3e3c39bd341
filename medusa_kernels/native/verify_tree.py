from torch import Tensor

from . import DTYPE, address


def arguments(
    logits: Tensor,
    tree_tokens: Tensor,
    parents: Tensor,
    acceptance: tuple[Tensor, ...] | None,
    accepted_nodes: Tensor,
    accept_length: Tensor,
    next_token: Tensor,
) -> tuple:
    return (
        *map(address, (logits, tree_tokens, parents)),
        *map(address, acceptance or [None] * 8),
        *map(address, (accepted_nodes, accept_length, next_token)),
        *logits.stride()[:2],
        parents.stride(0) if parents.dim() == 2 else 0,
        *logits.shape,
        accepted_nodes.shape[1] - 1,
        DTYPE[logits.dtype],
    )
