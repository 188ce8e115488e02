"""Loss guidance as part of the score: the gradient of a loss of the denoised image is subtracted from D.

This is DPS, FreeDoM and LGD in score form (with the loss of `edm2kit.guidance.losses.lgd`); their published steps,
which move x after each step of the solver, are in dps.py, freedom.py and polyak.py.
"""

import math
from dataclasses import dataclass, replace

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser, Wrapper, for_step
from edm2kit.guidance.losses.gradient import column, slope
from edm2kit.guidance.losses.loss import Loss
from edm2kit.guidance.losses.mpgd import slope_without_backprop


def check_scale(scale: float) -> None:
    """Raise ValueError if a scale is not finite."""
    if not math.isfinite(scale):
        raise ValueError(f"the scale of loss guidance is {scale}; expected a finite number (0 is off)")


@dataclass(frozen=True)
class LossGuided(Wrapper):
    """The denoiser D - scale * sigma^2 * (gradient of loss(D(x)) by x): the score of p(x) exp(-scale loss).

    Chung et al. 2023 (DPS, arXiv 2209.14687) and Yu et al. 2023 (FreeDoM, arXiv 2303.09833), in score form. The
    gradient runs through the denoiser, at about three times the cost of a plain call. Without `backprop` it stops at
    the denoised image, and the slope of the denoiser is taken to be that of Gaussian data, which gives
    D - scale * c_out^2 * (gradient by D): as in MPGD (He et al. 2024), at the cost of a plain call.

    `loss`: see `edm2kit.guidance.losses.loss`. At scale 0 guidance is off, bit for bit, and the loss is never called.
    Raises ValueError if the scale is not finite, and if the loss is not one number per image.

    Example: `LossGuided(net, lambda images: ((images.mean(dim=(1, 2, 3)) - 0.5) ** 2), scale=10.0)`.
    """

    denoiser: Denoiser
    loss: Loss
    scale: float
    backprop: bool = True
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def idle_fields(self) -> frozenset[str]:
        return frozenset() if self.scale else frozenset({"loss"})

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
        if self.scale == 0:
            return self.denoiser(x, sigma, condition)
        if self.backprop:
            found = slope(self.denoiser, self.loss, x, sigma, condition)
        else:
            found = slope_without_backprop(self.denoiser, self.loss, x, sigma, condition, self.sigma_data)
        return found.D - self.scale * column(sigma, x) ** 2 * found.gradient

    def scaled(self, share: float) -> "LossGuided":
        """The same with `share` of the strength: 0 is off, 1 as it is."""
        return replace(self, scale=self.scale * share)

    def for_step(self, i: int, sigmas: torch.Tensor) -> "LossGuided":
        # the loss takes its random numbers first: this order decides the images of a seed
        loss = for_step(self.loss, i, sigmas) if self.scale else self.loss
        return replace(self, denoiser=for_step(self.denoiser, i, sigmas), loss=loss)
