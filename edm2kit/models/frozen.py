"""EDM2 networks prepared for evaluation: each weight is normalised, scaled and cast once instead of at every call."""

from typing import TypeVar

import torch
from torch import nn

from edm2kit.models.edm2 import Precond
from edm2kit.models.layers import MPConv, convolve
from edm2kit.models.preconditioning import Preconditioner

Net = TypeVar("Net", bound=Preconditioner)

# which of a module's gains belongs to which of its layers
_GAINS = {"emb_linear": "emb_gain", "out_conv": "out_gain"}


class FrozenConv(nn.Module):
    """An `MPConv` that holds its effective weight, gain included, and no parameter."""

    effective: torch.Tensor

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        # not persistent: it must not be saved as a weight, nor normalised again
        self.register_buffer("effective", weight, persistent=False)

    def forward(self, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        return convolve(x, self.effective)


class Columns(nn.Module):
    """Columns `start` to `stop` of its input: the output of one layer among several computed as one."""

    def __init__(self, start: int, stop: int):
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        return x[:, self.start : self.stop]


@torch.no_grad()
def freeze_(net: Precond) -> Precond:
    """Prepare an EDM2 network for evaluation only: the same outputs in less time; returns it.

    Weights are normalised and scaled once and kept in `net.compute_dtype` (which cannot change any more), channels
    last; those of the embedding in float32. This goes layer by layer, so there is never a second copy of the network.
    Edits and gradients by the input work as before. The state dict no longer holds weights of a snapshot.

    Raises ValueError for a network that is already frozen.
    """
    if isinstance(net.raw.emb_shared, FrozenConv):
        raise ValueError("the network is already frozen: its weights and its precision cannot change any more")
    _join_embeddings_(net)
    # a list of the layers themselves would keep them all in memory
    parents = [module for module in net.modules() if not isinstance(module, MPConv)]
    for parent in parents:
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, MPConv):
                continue
            gain = getattr(parent, _GAINS[name]) if name in _GAINS else None
            weight = layer.effective_weight(gain)
            if weight.ndim == 4:
                weight = weight.to(net.compute_dtype).contiguous(memory_format=torch.channels_last)
            parent.add_module(name, FrozenConv(weight))
    return net.eval().requires_grad_(False)


def compile_(net: Net, backend: str = "inductor") -> Net:
    """Let torch.compile compile the raw network of a frozen denoiser; returns it.

    The first call of every batch size takes minutes; later calls are faster. Calls with edits or with gradients by
    the input run uncompiled.
    """
    net.raw.compile(backend=backend, dynamic=False)
    return net


def _join_embeddings_(net: Precond) -> None:
    """Compute the embedding layers of all blocks as a single matrix product."""
    weights: list[torch.Tensor] = []
    start = 0
    for block in net.raw.blocks:
        weights.append(block.emb_linear.effective_weight(block.emb_gain))
        block.emb_linear = Columns(start, start + len(weights[-1]))
        start += len(weights[-1])
    net.raw.emb_shared = FrozenConv(torch.cat(weights))
