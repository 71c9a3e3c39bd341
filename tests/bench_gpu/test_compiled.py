"""The compiled rival decodes as our decoder does."""

from __future__ import annotations

import torch

from bench.gpu import compiled, decoding
from medusa_kernels import Tree
from tests.bench_gpu.tiny import tiny_model


def test_the_compiled_decoder_decodes_like_ours():
    """Its logits along a text equal those of a forward pass over a chain."""
    _, model = tiny_model()
    text = [3, 1, 4, 1, 5, 9]
    rival = compiled.CompiledDecoder(model, batch=2, rows=16, compiled=False)
    ours = decoding.Decoder(model, None, Tree.from_choices([]), batch=2, max_seqlen=16)
    ours.start([text[:1], text[:1]], None)
    ours.cache.seqlens.zero_()
    for position, token in enumerate(text):
        ours.next_token.fill_(token)
        ours.step()
        rival.tokens.fill_(token)
        logits = rival.step()
        assert rival.position.item() == position + 1
        torch.testing.assert_close(logits, ours.logits[:, 0], rtol=1e-4, atol=1e-4)
        assert rival.tokens[:, 0].tolist() == ours.next_token.tolist()
