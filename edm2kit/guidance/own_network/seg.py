"""Smoothed-energy guidance: away from a network whose attention queries are blurred."""

import math
from dataclasses import dataclass

import torch

from edm2kit.denoiser import Denoiser
from edm2kit.guidance.attention_blocks import Blocks, attend, checked, grid_size, middle, network_of, parse_blocks
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.network_call import AttentionEdited, Perturbed
from edm2kit.guidance.option_types import number
from edm2kit.guidance.own_network.blur import blur, kernel_size


@dataclass(frozen=True)
class BlurredQueries:
    """Attention with the queries blurred over the pixels by a Gaussian of deviation `sigma`, in pixels.

    The queries are not normalised again: their shrinking is what smooths the energy. Infinite sigma is their mean.
    """

    sigma: float

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        size = grid_size(q.shape[2])
        if math.isinf(self.sigma):
            return attend(q.mean(dim=2, keepdim=True).expand_as(q), k, v)
        kernel = min(kernel_size(self.sigma), size - (size % 2 - 1))  # the authors' own limit
        if kernel == 1:
            return attend(q, k, v)
        n, heads, tokens, width = q.shape
        maps = q.transpose(2, 3).reshape(n * heads, width, size, size)
        blurred = blur(maps.float(), self.sigma, kernel).to(q.dtype)
        return attend(blurred.reshape(n, heads, width, tokens).transpose(2, 3).contiguous(), k, v)


def _negative(parts: Parts, *, seg_sigma: float, seg_blocks: Blocks) -> Denoiser:
    net = network_of(parts.net)
    blocks = middle(net) if seg_blocks is None else checked(net, seg_blocks)
    return Perturbed(net, AttentionEdited(blocks, BlurredQueries(seg_sigma)))


METHOD = Method(
    "smoothed-energy guidance: attention queries are blurred",
    "2 main",
    negative=_negative,
    weight=4.0,  # scale 3 in the authors' code, w = 1 + scale
    options=(
        Option("seg-sigma", number(0), math.inf, "deviation of the blur in pixels of the block; inf is the mean"),
        Option("seg-blocks", parse_blocks, None, "blocks to change; unset, the middle"),
    ),
    term="D(x; sigma, c) with attention queries G * Q",
    source="Hong 2024 (arXiv 2408.00760)",
)
