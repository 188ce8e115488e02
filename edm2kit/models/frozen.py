"""Networks made ready for evaluation: each weight normalised, scaled and cast once, not at every call."""

from collections.abc import Iterator

import torch
from torch import nn

from edm2kit.models.edm2 import Precond
from edm2kit.models.edm2_blocks import Block
from edm2kit.models.layers import MPConv, convolve

# which of a module's gains goes with which of its layers
_GAINS = {"emb_linear": "emb_gain", "out_conv": "out_gain"}


class Fixed(nn.Module):
    """A layer that holds its effective weight, gain included, and no parameter."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        # not persistent: nobody shall take this for a weight to be normalised, or save it as one
        self.register_buffer("effective", weight, persistent=False)

    def forward(self, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        return convolve(x, self.effective)


class Share(nn.Module):
    """What one layer would answer, out of the answers of several computed as one: columns `start` to `stop`."""

    def __init__(self, start: int, stop: int):
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        return x[:, self.start : self.stop]


@torch.no_grad()
def freeze_(net: Precond) -> Precond:
    """Make `net` one that can only be evaluated, with the same answers in less time; returns it.

    Weights are normalised and scaled once and kept in `net.compute_dtype` (which is thereby settled), channels last;
    those of the embedding in float32. This goes layer by layer, so that there is never a second copy of the network.
    Whatever a call may ask for, edits and gradients by the input included, works as before. The state dict loses its
    weights: they are no longer those of a snapshot. Raises ValueError for a network that is frozen already.
    """
    if isinstance(net.unet.emb_shared, Fixed):
        raise ValueError("the network is frozen already; its weights and its precision are settled")
    _join_embeddings_(net)
    for parent, name in list(_layers(net)):
        weight = parent.get_submodule(name).effective_weight(getattr(parent, _GAINS[name]) if name in _GAINS else None)
        if weight.ndim == 4:
            weight = weight.to(net.compute_dtype).contiguous(memory_format=torch.channels_last)
        parent.add_module(name, Fixed(weight))
    return net.eval().requires_grad_(False)


def compile_(net: Precond, backend: str = "inductor") -> Precond:
    """Have torch compile the U-Net of a frozen network; returns it.

    The first call of every batch size takes minutes, the next ones less time than without. Calls with edits, or that
    want a gradient by the input, run as before.
    """
    net.unet.compile(backend=backend, dynamic=False)
    return net


def _join_embeddings_(net: Precond) -> None:
    """Have one matmul compute what the embedding does to all blocks."""
    weights, start = [], 0
    for block in net.modules():
        if isinstance(block, Block):
            weights.append(block.emb_linear.effective_weight(block.emb_gain))
            block.emb_linear = Share(start, start + len(weights[-1]))
            start += len(weights[-1])
    net.unet.emb_shared = Fixed(torch.cat(weights))


def _layers(net: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Of every MPConv, the module that holds it and its name there; not itself, so that it can go."""
    for parent in net.modules():
        for name, child in parent.named_children():
            if isinstance(child, MPConv):
                yield parent, name
