"""The rivals of tree attention compute tree attention."""

from __future__ import annotations

import pytest

from bench import ops
from bench.gpu import attention_rivals, kernels
from tests.bench_gpu.tiny import ATTENTION


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_rivals_compute_tree_attention():
    work = kernels.made("tree_attention", "fp32", ATTENTION, "cpu")
    reference = ops.call("tree_attention", "reference", "cpu", work)
    arguments = work.arguments[:6]
    for rival in (attention_rivals.sdpa(*arguments), attention_rivals.flex(*arguments, compiled=False)):
        assert kernels.difference("tree_attention", work, rival, reference) == ""
