"""Masked sliding-window guidance (M-SWG): away from the network evaluated on overlapping crops.

Every crop holds the pixels of x themselves at the same noise level, so at a pixel p the noise predicted from a crop is
(x_p - D_p(crop)) / sigma with the same x_p for all crops and for the whole image: combining D is the same as combining
scores or noise predictions.

Alone, guidance acts where crops overlap. Combined with other guidance, the authors' code takes the crops everywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from edm2kit.conditions import repeat_condition
from edm2kit.denoiser import Denoiser, Wrapper
from edm2kit.guidance.attention_blocks import size_divisor
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.combine import Evaluation
from edm2kit.guidance.option_types import count

PER_SIDE = 2  # crops in each direction


@dataclass(frozen=True)
class SlidingWindows(Wrapper):
    """The negative that is the mean over crops of what `net` answers, where crops overlap; elsewhere D itself.

    Without `masked` it is that mean everywhere, as in combinations with other methods (`in_combination`). 2 x 2 square
    crops of `size` pixels cover the image evenly. If `size` is None, it is 5/8 of the longer side, rounded up to a size
    that the network can downsample, and at most the shorter side. Raises ValueError if crops do not fit or leave gaps.
    """

    net: Denoiser
    size: int | None = None
    masked: bool = True
    reads: tuple[str, ...] = ()

    def in_combination(self) -> "SlidingWindows":
        """The same as one of several methods: without a mask."""
        return replace(self, masked=False)

    def derive(self, D: torch.Tensor, maps: Mapping[str, torch.Tensor], at: Evaluation) -> torch.Tensor:
        corners, size = self.corners(*at.x.shape[2:])
        crops = torch.cat([at.x[:, :, top : top + size, left : left + size] for top, left in corners])
        sigma = torch.as_tensor(at.sigma)
        if sigma.ndim:
            sigma = sigma.repeat(len(corners))
        answers = self.net(crops, sigma, repeat_condition(at.condition, len(corners)))
        total, coverage = torch.zeros_like(D), torch.zeros_like(D[:1, :1])
        for (top, left), answer in zip(corners, answers.chunk(len(corners)), strict=True):
            total[:, :, top : top + size, left : left + size] += answer.to(D.dtype)
            coverage[:, :, top : top + size, left : left + size] += 1
        mean = total / coverage
        return torch.where(coverage > 1, mean, D) if self.masked else mean

    def corners(self, height: int, width: int) -> tuple[list[tuple[int, int]], int]:
        """The top left corners of the crops, (top, left), and the size of a crop, for an image of height x width."""
        divisor = size_divisor(self.net, height)
        usual = -(-5 * max(height, width) // (8 * divisor)) * divisor
        size = min(usual, height, width) if self.size is None else self.size
        covers = max(height, width) <= size * PER_SIDE
        fits = size <= min(height, width)
        if not covers or not fits or size % divisor:
            raise ValueError(
                f"crops of {size} pixels on {height}x{width}; expected a multiple of {divisor}, at least half as large "
                "as the image and no larger (--sliding-window-size)"
            )
        starts = [k / (PER_SIDE - 1) for k in range(PER_SIDE)]
        corners = [(int(v * (height - size)), int(h * (width - size))) for v in starts for h in starts]
        return corners, size


def _negative(parts: Parts, *, sliding_window_size: int | None) -> SlidingWindows:
    return SlidingWindows(parts.net, sliding_window_size)


METHOD = Method(
    "masked sliding-window guidance (M-SWG): away from the network evaluated on overlapping crops",
    "5 main (4 of them crops: 2.56 times the area at 64x64)",
    negative=_negative,
    weight=1.2,  # EDM2-S, FID; 2.1 for FD-DINOv2
    options=(
        Option(
            "sliding-window-size", count(), None, "Height and width of a crop, in pixels  [default: 5/8 of the image]"
        ),
    ),
    term="mean of D over 2x2 crops; alone, where they overlap, else D",
    source="Adaloglou, Kaiser, Iagudin, Kollmann, 'Guiding a diffusion model with itself using sliding windows', BMVC "
    "2025 (arXiv 2411.10257v3)",
    pick_when="you have a single convolutional network and want better global structure; works unconditionally",
)
