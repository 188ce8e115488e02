"""Smoothed-energy guidance (SEG): away from a network whose attention queries are blurred."""

import math
from dataclasses import dataclass

import torch

from edm2kit.denoiser import Denoiser
from edm2kit.guidance.attention_blocks import (
    Blocks,
    attend,
    checked,
    grid_size,
    middle,
    parse_blocks,
    require_attention,
)
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.network_call import AttentionEdit, NetworkCall, Perturbed
from edm2kit.guidance.option_types import number
from edm2kit.guidance.own_network.blur import blur, kernel_size


@dataclass(frozen=True)
class BlurredQueries:
    """Attention with its queries blurred over the tokens by a Gaussian of standard deviation `sigma`, in tokens.

    The queries are not normalised again: that they shrink is what smooths the energy. Infinite sigma is their mean.
    `image_size` is the height and width of what the network is called with.
    """

    sigma: float
    image_size: tuple[int, int]

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if math.isinf(self.sigma):
            return attend(q.mean(dim=2, keepdim=True).expand_as(q), k, v)
        grid = grid_size(q.shape[2], *self.image_size)
        size = min(grid)
        kernel = min(kernel_size(self.sigma), size - (size % 2 - 1))  # the authors' own limit
        if kernel == 1:
            return attend(q, k, v)
        n, heads, tokens, width = q.shape
        maps = q.transpose(2, 3).reshape(n * heads, width, *grid)
        blurred = blur(maps.float(), self.sigma, kernel).to(q.dtype)
        return attend(blurred.reshape(n, heads, width, tokens).transpose(2, 3).contiguous(), k, v)


@dataclass(frozen=True)
class QueryBlur:
    """The change that blurs the queries of `blocks`. No blocks, no change."""

    blocks: tuple[str, ...]
    sigma: float

    def __call__(self, call: NetworkCall) -> NetworkCall:
        height, width = call.x.shape[2:]
        return AttentionEdit(self.blocks, BlurredQueries(self.sigma, (height, width)))(call)


def _negative(parts: Parts, *, seg_sigma: float, seg_blocks: Blocks) -> Denoiser:
    net = require_attention(parts.net, "smoothed-energy guidance", "attention")
    blocks = middle(net) if seg_blocks is None else checked(net, seg_blocks)
    if seg_blocks is None and not blocks:
        raise ValueError(
            "smoothed-energy guidance acts on the attention in the middle of a network, and this one has none there. "
            "Name blocks with --seg-blocks"
        )
    return Perturbed(net, QueryBlur(blocks, seg_sigma))


METHOD = Method(
    "smoothed-energy guidance (SEG): away from the network with blurred attention queries",
    "2 main",
    negative=_negative,
    weight=4.0,  # scale 3 in the authors' code, w = 1 + scale
    options=(
        Option(
            "seg-sigma", number(0), math.inf, "Standard deviation of the blur, in tokens of the block; inf: their mean"
        ),
        Option(
            "seg-blocks",
            parse_blocks,
            None,
            "Attention blocks to change, names separated by commas  [default: those in the middle]",
        ),
    ),
    term="D(x; sigma, c) with attention queries G * Q",
    source="Hong 2024 (arXiv 2408.00760)",
    pick_when="perturbed-attention guidance saturates colours; same cost, adjustable by the blur",
)
