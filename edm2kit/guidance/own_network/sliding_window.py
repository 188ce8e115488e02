"""Masked sliding-window guidance: away from what the network makes of overlapping crops."""

from dataclasses import dataclass

import torch

from edm2kit.denoiser import Network
from edm2kit.guidance.attention_blocks import middle, network_of, resolution
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.option_types import count

PER_SIDE = 2  # crops in each direction


@dataclass(frozen=True)
class SlidingWindows:
    """The mean of what `net` says of overlapping crops, where crops overlap; elsewhere its own answer.

    2 x 2 square crops of `size` pixels (None: 5/8 of the image's height, rounded up to what the network can halve)
    cover the image evenly. Raises ValueError on crops that do not fit or leave gaps.
    """

    net: Network
    size: int | None = None
    reads: tuple[str, ...] = ()

    def beside(
        self,
        D: torch.Tensor,
        maps: dict[str, torch.Tensor],
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor | None,
    ) -> torch.Tensor:
        corners, size = self.corners(*x.shape[2:])
        crops = torch.cat([x[:, :, top : top + size, left : left + size] for top, left in corners])
        sigma = torch.as_tensor(sigma)
        answers = self.net(
            crops,
            sigma.repeat(len(corners)) if sigma.ndim else sigma,
            None if labels is None else labels.repeat(len(corners), 1),
        )
        total, coverage = torch.zeros_like(D), torch.zeros_like(D[:1, :1])
        for (top, left), answer in zip(corners, answers.chunk(len(corners)), strict=True):
            total[:, :, top : top + size, left : left + size] += answer.to(D.dtype)
            coverage[:, :, top : top + size, left : left + size] += 1
        return torch.where(coverage > 1, total / coverage, D)

    def corners(self, height: int, width: int) -> tuple[list[tuple[int, int]], int]:
        """Where the crops begin, (top, left), and how large they are."""
        size = self._usual_size(height) if self.size is None else self.size
        if not max(height, width) / PER_SIDE <= size <= min(height, width) or size % self._halved(height):
            raise ValueError(
                f"crops of {size} pixels on {height}x{width}; expected a multiple of {self._halved(height)}, at least "
                "half as large as the image and no larger"
            )
        tops, lefts = ([k * (side - size) // (PER_SIDE - 1) for k in range(PER_SIDE)] for side in (height, width))
        return [(top, left) for top in tops for left in lefts], size

    def _usual_size(self, height: int) -> int:
        step = self._halved(height)
        return min(-(-5 * height // (8 * step)) * step, height)

    def _halved(self, height: int) -> int:
        """What sizes must be a multiple of: how much smaller the image is where the network is deepest."""
        (block,) = middle(self.net)
        return max(height // resolution(block), 1)


def _negative(parts: Parts, *, windows_size: int | None) -> SlidingWindows:
    return SlidingWindows(network_of(parts.net), windows_size)


METHOD = Method(
    "masked sliding-window guidance: overlapping crops on their own",
    "5 main (4 of them crops: 2.56 times the area at 64x64)",
    negative=_negative,
    weight=1.2,  # EDM2-S, FID; 2.1 for FD-DINOv2
    options=(Option("windows-size", count(), None, "height and width of a crop; unset, 5/8 of the image"),),
    term="mean of D over 2x2 crops, where they overlap; else D",
    source="Kaiser et al. 2024, 'The Unreasonable Effectiveness of Guidance for Diffusion Models' (arXiv 2411.10257)",
)
