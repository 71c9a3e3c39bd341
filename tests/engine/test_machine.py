"""What the engine runs on: the device that a word stands for, and what is said where it is not there."""

import pytest
import torch

from medusa_engine.machine import choose_device


@pytest.fixture
def gpus(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)


@pytest.mark.parametrize(
    ("gpus", "device", "backend", "chosen"),
    [
        (0, None, "auto", "cpu"),
        (0, None, "reference", "cpu"),
        (2, None, "auto", "cuda"),
        (2, None, "triton", "cuda"),
        (2, None, "reference", "cpu"),
        (2, "cpu", "auto", "cpu"),
        (2, "cuda:1", "auto", "cuda:1"),
        (2, torch.device("cuda", 1), "auto", "cuda:1"),
    ],
    indirect=["gpus"],
)
def test_the_device(gpus, device, backend, chosen):
    assert choose_device(device, backend) == torch.device(chosen)


@pytest.mark.parametrize(
    ("gpus", "device", "backend", "message"),
    [
        (0, "toaster", "auto", "device must be a CPU or CUDA device, not 'toaster'"),
        (0, "meta", "auto", "device must be a CPU or CUDA device, not 'meta'"),
        (0, "cuda", "auto", "device 'cuda' cannot be used: PyTorch finds no CUDA device here"),
        (0, None, "triton", "backend 'triton' cannot be used: PyTorch finds no CUDA device here"),
        (2, "cuda:2", "auto", "device 'cuda:2' cannot be used: PyTorch finds only 2, the first of them cuda:0"),
    ],
    indirect=["gpus"],
)
def test_a_device_that_is_not_here(gpus, device, backend, message):
    with pytest.raises(ValueError, match=message):
        choose_device(device, backend)
