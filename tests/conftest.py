import os
import sys
from pathlib import Path

# Before PyTorch is there: in processes that share the cores, its threads spin in each other's way.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a Triton kernel's module is imported

import pytest

try:
    from hypothesis import settings
except ImportError:  # a GPU machine without it still runs every test that does not ask for it
    pass
else:
    settings.register_profile("quick", deadline=None, derandomize=True, max_examples=25, database=None)
    settings.register_profile("deep", deadline=None, max_examples=2000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture
def backend(request):
    """A backend by indirect parametrisation: see tests/backends.py."""
    with request.param.active() as active:
        yield active
