"""Weights for the Inception network that need no download."""

import json
import math

import torch

from tests.support.golden import DATA


def shapes() -> dict[str, list[int]]:
    """Names and shapes of the published state dict."""
    return json.loads((DATA / "inception_keys.json").read_text())["keys"]


def weights() -> dict[str, torch.Tensor]:
    """The state dict behind the golden features: a recipe, drawn name by name in sorted order."""
    return {name: _draw(name, shape, seed) for seed, (name, shape) in enumerate(sorted(shapes().items()))}


def _draw(name: str, shape: list[int], seed: int) -> torch.Tensor:
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if name.endswith(".conv.weight"):
        return normal * math.sqrt(2 / math.prod(shape[1:]))
    if name.endswith(".bn.weight"):
        return 1 + 0.1 * normal
    if name.endswith((".bn.bias", ".running_mean")):
        return 0.1 * normal
    if name.endswith(".running_var"):
        return 1 + 0.1 * normal.abs()
    return torch.tensor(0) if name.endswith(".num_batches_tracked") else 0.02 * normal
