"""Polyak step sizes for loss guidance: Shen et al. 2024 (arXiv 2403.12404), and Polyak's own."""

from dataclasses import dataclass

import torch

from edm2kit.guidance.losses.gradient import column
from edm2kit.guidance.losses.gradient_step import StepStart, image_norm, zero_where_flat


@dataclass(frozen=True)
class PolyakStep:
    """`step` * ||(x - D) / sigma|| * g / ||g||^2, as in the code of Shen et al. 2024. A rule of `GradientStep`.

    It depends on the unit of the loss; `TruePolyakStep` does not.
    """

    step: float = 0.1

    def __call__(self, at: StepStart, sigma_next: torch.Tensor) -> torch.Tensor:
        noise = image_norm(at.x - at.D) / at.sigma
        return zero_where_flat(self.step * noise * at.gradient / image_norm(at.gradient) ** 2, at.gradient)


@dataclass(frozen=True)
class TruePolyakStep:
    """(loss - lowest) * g / ||g||^2, Polyak's own: a loss that is affine in x falls to `lowest` in one step."""

    lowest: float = 0.0

    def __call__(self, at: StepStart, sigma_next: torch.Tensor) -> torch.Tensor:
        left = column((at.loss - self.lowest).clamp_min(0), at.x)
        return zero_where_flat(left * at.gradient / image_norm(at.gradient) ** 2, at.gradient)
