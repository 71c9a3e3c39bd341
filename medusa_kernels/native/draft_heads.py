from torch import Tensor

from . import DTYPE, address, weight


def arguments(
    hidden: Tensor,
    block_weight,
    block_bias: Tensor | None,
    lm_head_weight,
    token_map: Tensor | None,
    top_k: int,
    draft_tokens: Tensor,
    logprobs: Tensor,
) -> tuple:
    heads, layers = block_weight.shape[:2]
    blocks, block_format = weight(block_weight)
    lm_head, lm_head_format = weight(lm_head_weight)
    return (
        *(hidden.data_ptr(), blocks, address(block_bias), lm_head),
        *map(address, (token_map, draft_tokens, logprobs)),
        hidden.stride(0),
        *(hidden.shape[0], heads, layers, hidden.shape[1], lm_head_weight.shape[-2], top_k),
        int(len(lm_head_weight.shape) == 3),
        DTYPE[hidden.dtype],
        0 if block_bias is None else DTYPE[block_bias.dtype],
        block_format,
        lm_head_format,
    )
