"""Polyak step sizes for loss guidance: Shen et al. 2024 (arXiv 2403.12404), and Polyak's own.

Shen et al. move a variance-preserving x' = x / sqrt(1 + sigma^2) by -step * ||eps|| g' / ||g'||^2, where g' is the
gradient by x' of the norm ||r|| of a residual. g' is sqrt(1 + sigma^2) times the gradient g of ||r|| by x, and the step
ends at x = sqrt(1 + sigma_next^2) x'. So x moves by

    -step * sqrt((1 + sigma_next^2) / (1 + sigma^2)) * ||eps|| g / ||g||^2.
"""

from dataclasses import dataclass

import torch

from edm2kit.guidance.losses.gradient import column
from edm2kit.guidance.losses.gradient_step import StepStart, image_norm, norm_slope, zero_where_flat


@dataclass(frozen=True)
class PolyakStep:
    """`step` * sqrt((1 + sigma_next^2) / (1 + sigma^2)) * ||(x - D) / sigma|| * g / ||g||^2, as in the authors' code.

    g is the gradient of ||r||, the loss being ||r||^2. A rule of `GradientStep`. It depends on the unit of the loss;
    `TruePolyakStep` does not.
    """

    step: float = 0.1

    def __call__(self, at: StepStart, sigma_next: torch.Tensor) -> torch.Tensor:
        noise = image_norm(at.x - at.D) / at.sigma
        towards_vp = ((1 + sigma_next**2) / (1 + at.sigma**2)).sqrt()
        slope = norm_slope(at)
        return zero_where_flat(self.step * towards_vp * noise * slope / image_norm(slope) ** 2, at.gradient)


@dataclass(frozen=True)
class TruePolyakStep:
    """(loss - lowest) * g / ||g||^2, Polyak's own: a loss that is affine in x falls to `lowest` in one step."""

    lowest: float = 0.0

    def __call__(self, at: StepStart, sigma_next: torch.Tensor) -> torch.Tensor:
        left = column((at.loss - self.lowest).clamp_min(0), at.x)
        return zero_where_flat(left * at.gradient / image_norm(at.gradient) ** 2, at.gradient)
