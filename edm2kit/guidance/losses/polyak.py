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

_SHORTEST = 1e-6  # of the authors' gradients, by a variance-preserving x
_LEAST_CHANGE = 1e-6  # of the loss, if x moved by its own length


@dataclass(frozen=True)
class PolyakStep:
    """`step` * sqrt((1 + sigma_next^2) / (1 + sigma^2)) * ||(x - D) / sigma|| * g / ||g||^2, as in the authors' code.

    g is the gradient of ||r||, the loss being ||r||^2. A rule of `GradientStep`. It depends on the unit of the loss;
    `TruePolyakStep` does not. Zero where sqrt(1 + sigma^2) ||g||, the norm of the authors' gradient, is below 1e-6.
    """

    step: float = 0.1

    def __call__(self, at: StepStart, sigma_next: torch.Tensor) -> torch.Tensor:
        noise = image_norm(at.x - at.D) / at.sigma
        towards_vp = ((1 + sigma_next**2) / (1 + at.sigma**2)).sqrt()
        slope = norm_slope(at)
        length = image_norm(slope)
        shift = self.step * towards_vp * noise * slope / length**2
        return torch.where((1 + at.sigma**2).sqrt() * length < _SHORTEST, torch.zeros_like(shift), shift)


@dataclass(frozen=True)
class TruePolyakStep:
    """(loss - lowest) * g / ||g||^2, Polyak's own: a loss that is affine in x falls to `lowest` in one step.

    Zero where g is so short that even a step of the length of x would lower the loss by less than a millionth of what
    is left.
    """

    lowest: float = 0.0

    def __call__(self, at: StepStart, sigma_next: torch.Tensor) -> torch.Tensor:
        left = column((at.loss - self.lowest).clamp_min(0), at.x)
        length = image_norm(at.gradient)
        shift = zero_where_flat(left / length * (at.gradient / length), at.gradient)
        return torch.where(length * image_norm(at.x) < _LEAST_CHANGE * left, torch.zeros_like(shift), shift)
