"""What one evaluation of a network costs, counted without allocating its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from edm2kit.models.edm2 import Precond
from edm2kit.models.layers import MPConv

_MODULE = "Precond"  # how torch's counter begins the names of a Precond's modules


@dataclass(frozen=True)
class Layer:
    """One layer: `shape` of its weight (None for the products of attention), `multiply_adds` for one image."""

    name: str
    shape: tuple[int, ...] | None
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Cost:
    """The layers of a network in their order, and their sums; gains belong to the sums alone."""

    layers: tuple[Layer, ...]
    parameters: int

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one evaluation of one image: convolutions, linear layers and attention."""
        return sum(layer.multiply_adds for layer in self.layers)


def evaluation_cost(architecture: Mapping[str, Any]) -> Cost:
    """The cost of one evaluation D(x; sigma, labels) of `Precond(**architecture)`, batch 1.

    Counted by torch on the meta device; a multiply-add is two of its floating-point operations. Normalising the
    weights is left out, and the uncertainty head, which only training evaluates, counts nothing.
    """
    with torch.device("meta"):
        net = Precond(**architecture).eval()
        x = torch.empty(1, net.img_channels, net.img_resolution, net.img_resolution)
        labels = torch.empty(1, net.label_dim) if net.label_dim else None
        sigma = torch.empty(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, sigma, labels)
    counted = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    layers = []
    for name, module in net.named_modules():
        own = counted.get(f"{_MODULE}.{name}", 0)
        if isinstance(module, MPConv):
            layers.append(Layer(name, tuple(module.weight.shape), module.weight.numel(), own))
        elif getattr(module, "num_heads", 0):
            inside = sum(counted.get(f"{_MODULE}.{name}.{child}", 0) for child, _ in module.named_children())
            layers.append(Layer(f"{name}.attention", None, 0, own - inside))
    cost = Cost(tuple(layers), sum(p.numel() for p in net.parameters()))
    assert cost.multiply_adds == counted["Global"], "an operation was counted outside of every layer"
    return cost
