from torch import Tensor


def arguments(kv_cache: Tensor, accepted_nodes: Tensor, accept_length: Tensor, cache_seqlens: Tensor) -> tuple:
    layers, _, batch, _, kv_heads, head_dim = kv_cache.shape
    return (
        kv_cache.data_ptr(),
        *(t.data_ptr() for t in (accepted_nodes, accept_length, cache_seqlens)),
        *kv_cache.stride()[:4],
        *(layers, batch, accepted_nodes.shape[1]),
        kv_heads * head_dim * kv_cache.element_size(),
        kv_cache.element_size(),
    )
