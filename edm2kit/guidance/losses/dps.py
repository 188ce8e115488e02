"""Diffusion posterior sampling (DPS): Chung et al. 2023 (arXiv 2209.14687). In score form: `LossGuided`."""

from dataclasses import dataclass

import torch

from edm2kit.guidance.losses.gradient import column
from edm2kit.guidance.losses.gradient_step import StepStart, zero_where_flat


@dataclass(frozen=True)
class DPSStep:
    """`step` * g / sqrt(loss), for a sum of squares as the loss: Chung et al. 2023, Alg. 1. For `GradientStep`."""

    step: float = 1.0

    def __call__(self, at: StepStart, sigma_next: torch.Tensor) -> torch.Tensor:
        return zero_where_flat(self.step * at.gradient / column(at.loss, at.x).sqrt(), at.gradient)
