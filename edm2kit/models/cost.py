"""What one evaluation of a network costs, counted without allocating its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from edm2kit.models.networks import DEFAULT_NETWORK, build_network


@dataclass(frozen=True)
class LayerCost:
    """One layer: `shape` of its weight (None for the products of attention), `multiply_adds` for one image."""

    name: str
    shape: tuple[int, ...] | None
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Cost:
    """The layers of a network in order of computation; `parameters` in total, with gains and biases."""

    layers: tuple[LayerCost, ...]
    parameters: int

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one evaluation of one image: convolutions, linear layers and attention."""
        return sum(layer.multiply_adds for layer in self.layers)


def evaluation_cost(architecture: Mapping[str, Any], kind: str = DEFAULT_NETWORK) -> Cost:
    """The cost of one evaluation D(x; sigma, labels) of a network of this architecture and kind, batch 1.

    Counted by torch on the meta device; a multiply-add is two of its floating-point operations. Normalising the
    weights is not counted, nor is the uncertainty head, which only training evaluates.

    Example: `evaluation_cost(full_architecture(64, 4, 1000, 0.5, {"model_channels": 128})).multiply_adds`.
    """
    with torch.device("meta"):
        net = build_network(architecture, kind).eval()
        x = torch.empty(1, net.img_channels, net.img_resolution, net.img_resolution)
        labels = torch.empty(1, net.label_dim) if net.label_dim else None
        sigma = torch.empty(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, sigma, labels)
    # torch begins every name with the class of the network
    prefix = type(net).__name__
    counted = {name: sum(operations.values()) // 2 for name, operations in counter.get_flop_counts().items()}
    layers = []
    for name, module in net.named_modules():
        inside = sum(counted.get(f"{prefix}.{name}.{child}", 0) for child, _ in module.named_children())
        own = counted.get(f"{prefix}.{name}", 0) - inside
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor):
            layers.append(LayerCost(name, tuple(weight.shape), weight.numel(), own))
        elif name and own:
            layers.append(LayerCost(f"{name}.attention", None, 0, own))
    cost = Cost(tuple(layers), sum(p.numel() for p in net.parameters()))
    assert cost.multiply_adds == counted["Global"], "an operation was counted outside of every layer"
    return cost
