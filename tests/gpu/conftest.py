"""Tests on a real GPU. They run if they are asked for, on a machine that has one:

EDM2KIT_GPU_TESTS=1 python -m pytest tests/gpu
"""

import os
from pathlib import Path

import pytest
import torch

from edm2kit.torch_utils import dist

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("EDM2KIT_GPU_TESTS") == "1" and torch.cuda.is_available():
        return
    skipped = pytest.mark.skip(reason="needs an NVIDIA GPU and EDM2KIT_GPU_TESTS=1")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skipped)


@pytest.fixture
def device():
    """The GPU, as every command uses it."""
    with dist.session("cuda") as picked:
        yield picked
