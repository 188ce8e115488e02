"""The networks that are measured, and inputs for them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from edm2kit.models import Precond, full_architecture

SMALL = full_architecture(32, 3, 10, 0.5, {"model_channels": 64, "channel_mult": [1, 2, 2], "num_blocks": 2})
GUIDE = full_architecture(
    32, 3, 10, 0.5, {"model_channels": 32, "channel_mult": [1, 2, 2], "num_blocks": 2, "channels_per_head": 32}
)
XS64 = full_architecture(64, 3, 1000, 0.5, {"model_channels": 128})


class Batch(NamedTuple):
    """`x` [N, C, H, W] of unit variance, `sigma` [N] from 0.002 to 80, one-hot `labels` [N, K]."""

    x: torch.Tensor
    sigma: torch.Tensor
    labels: torch.Tensor


def random_network(architecture: Mapping[str, Any], seed: int = 0) -> Precond:
    """A network with random weights and gains of 1 (training starts with gains of 0, which skip most of the work)."""
    torch.manual_seed(seed)
    net = Precond(**architecture)
    for name, parameter in net.named_parameters():
        if name.endswith("gain"):
            parameter.data.fill_(1.0)
    return net


def random_batch(architecture: Mapping[str, Any], size: int, seed: int = 0) -> Batch:
    """Random inputs for a network of this architecture."""
    rng = torch.Generator().manual_seed(seed)
    side, classes = architecture["img_resolution"], architecture["label_dim"]
    sigma = torch.logspace(-2.7, 1.9, size) if size > 1 else torch.ones(1)
    labels = torch.eye(classes)[torch.randint(classes, [size], generator=rng)]
    return Batch(torch.randn(size, architecture["img_channels"], side, side, generator=rng), sigma, labels)
