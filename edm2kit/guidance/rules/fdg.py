"""Frequency-decoupled guidance (FDG): a smaller weight for low frequencies than for high ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edm2kit.guidance.base import Option, Rule
from edm2kit.guidance.combine import Evaluation
from edm2kit.guidance.option_types import number

_BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def _smoothed(images: torch.Tensor) -> torch.Tensor:
    """`images` [N, C, H, W] blurred by the binomial filter of 5 taps, mirrored at the edges."""
    channels = images.shape[1]
    # filled on the device: torch.tensor would copy from the host, and wait, in every step
    taps = torch.stack([images.new_full([], tap) for tap in _BINOMIAL])
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="reflect")
    across = taps.reshape(1, 1, 1, 5).expand(channels, 1, 1, 5)
    down = taps.reshape(1, 1, 5, 1).expand(channels, 1, 5, 1)
    return torch.nn.functional.conv2d(
        torch.nn.functional.conv2d(padded, across, groups=channels), down, groups=channels
    )


def low_frequencies(images: torch.Tensor) -> torch.Tensor:
    """What the coarse level of a Laplacian pyramid of two levels holds of `images` [N, C, H, W], in their own size.

    Blur, halve, enlarge, blur (Burt & Adelson 1983), with bilinear resampling. Raises ValueError if the images have
    less than 5 pixels in height or width.
    """
    height, width = images.shape[2:]
    if min(height, width) < 5:
        raise ValueError(
            f"frequency-decoupled guidance needs images of at least 5x5 pixels, and these have {height}x{width}. "
            "Choose another rule"
        )
    resize = torch.nn.functional.interpolate
    half = resize(_smoothed(images), ((height + 1) // 2, (width + 1) // 2), mode="bilinear", align_corners=False)
    return _smoothed(resize(half, (height, width), mode="bilinear", align_corners=False))


@dataclass(frozen=True)
class FrequencyDecoupling:
    """The linear rule with the weight w for high frequencies, and 1 + share (w - 1) for low ones.

    Frequencies are split by a Laplacian pyramid of two levels, which is linear, so splitting the difference is the same
    as splitting D and its negatives and putting the results together. Since all see the same x, it is also the same
    for predictions of noise or of velocities. Share 1 is the linear rule, 0 guides high frequencies only.
    """

    low_share: float

    def __call__(
        self, D: torch.Tensor, negatives: Sequence[torch.Tensor], weights: Sequence[float], at: Evaluation
    ) -> torch.Tensor:
        change = torch.zeros_like(D)
        for weight, negative in zip(weights, negatives, strict=True):
            change = change + (weight - 1) * (D - negative)
        return D + change - (1 - self.low_share) * low_frequencies(change)


def _make(*, fdg_low_share: float) -> FrequencyDecoupling:
    return FrequencyDecoupling(fdg_low_share)


RULE = Rule(
    "frequency-decoupled guidance (FDG): less weight for low frequencies than for high ones",
    _make,
    options=(
        Option(
            "fdg-low-share",
            number(0),
            0.4444,
            "Strength w - 1 of low frequencies as a share of that of high ones; the default makes weights of 10 and 5",
        ),
    ),
    formula="D + sum of (w_i - 1) (d_i - (1 - share) low(d_i)), d_i = D - D_neg_i",
    source="Sadat et al. 2025 (arXiv 2506.19713); tested on SDXL (weights 10 and 5) and DiT",
    pick_when="larger weights would add detail, but colours and composition are already saturated",
)
