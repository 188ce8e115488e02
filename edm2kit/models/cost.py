"""What one evaluation of a network costs, counted without allocating its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edm2kit.models.networks import DEFAULT_NETWORK, build_network

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


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
    from torch.utils.flop_counter import FlopCounterMode  # importing it takes a tenth of a second

    with torch.device("meta"):
        net = build_network(architecture, kind).eval()
        x = torch.empty(1, net.img_channels, net.img_resolution, net.img_resolution)
        labels = torch.empty(1, net.label_dim) if net.label_dim else None
        sigma = torch.empty(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        own = _count_own_flops(net, counter)
        net(x, sigma, labels)
    layers = []
    for name, module in net.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor):
            layers.append(LayerCost(name, tuple(weight.shape), weight.numel(), own[name] // 2))
        elif own[name]:
            layers.append(LayerCost(f"{name}.attention", None, 0, own[name] // 2))
    cost = Cost(tuple(layers), sum(p.numel() for p in net.parameters()))
    assert cost.multiply_adds == counter.get_total_flops() // 2, "an operation was counted outside of every layer"
    return cost


def _count_own_flops(net: nn.Module, counter: "FlopCounterMode") -> dict[str, int]:
    """From now on, count the operations of each module of `net` that are not those of a module inside it."""
    own = dict.fromkeys((name for name, _ in net.named_modules()), 0)
    last_total = 0
    running: list[str] = []

    def credit() -> None:
        nonlocal last_total
        total = counter.get_total_flops()
        if running:
            own[running[-1]] += total - last_total
        last_total = total

    def enter(name: str) -> None:
        credit()
        running.append(name)

    def leave() -> None:
        credit()
        running.pop()

    for name, module in net.named_modules():
        module.register_forward_pre_hook(lambda module, inputs, name=name: enter(name))
        module.register_forward_hook(lambda module, inputs, output: leave())
    return own
