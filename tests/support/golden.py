"""Reading the golden arrays in tests/data."""

import json

import numpy as np
import torch

from edm2kit.models.edm2 import Precond
from tests.support import DATA


def load(name: str) -> dict[str, torch.Tensor]:
    """All arrays of an .npz as tensors."""
    with np.load(DATA / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def part(arrays: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The arrays whose names start with `prefix`, without it."""
    return {key[len(prefix) :]: value for key, value in arrays.items() if key.startswith(prefix)}


def architecture(name: str) -> dict:
    """Precond's arguments for the golden network `cond` or `uncond`."""
    return json.loads((DATA / "meta.json").read_text())["configs"][name]


def network(name: str, state: dict[str, torch.Tensor] | None = None) -> Precond:
    """The golden network `cond` or `uncond`, with `state` where given."""
    net = Precond(**architecture(name))
    if state is not None:
        net.load_state_dict(state)
    return net.eval()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """|a - b| <= t + t * |b| elementwise, the golden values' own rule."""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
