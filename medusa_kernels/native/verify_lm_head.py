from torch import Tensor

from . import DTYPE, address, weight


def arguments(
    hidden: Tensor,
    lm_head_weight,
    tree_tokens: Tensor,
    parents: Tensor,
    acceptance: tuple[Tensor, ...] | None,
    accepted_nodes: Tensor,
    accept_length: Tensor,
    next_token: Tensor,
) -> tuple:
    lm_head, lm_head_format = weight(lm_head_weight)
    batch, n, hidden_size = hidden.shape
    return (
        *(hidden.data_ptr(), lm_head, *map(address, (tree_tokens, parents))),
        *map(address, acceptance or [None] * 8),
        *map(address, (accepted_nodes, accept_length, next_token)),
        parents.stride(0) if parents.dim() == 2 else 0,
        *(batch, n, hidden_size, lm_head_weight.shape[0], accepted_nodes.shape[1] - 1),
        DTYPE[hidden.dtype],
        lm_head_format,
    )
