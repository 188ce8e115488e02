"""FreeDoM: Yu et al. 2023 (arXiv 2303.09833). Its time travel is a solver, `edm2kit.sampling.time_travel`."""

from dataclasses import dataclass

import torch

from edm2kit.guidance.losses.gradient_step import StepStart, image_norm, zero_where_flat


@dataclass(frozen=True)
class FreeDoMStep:
    """Along g, with an RMS of `share` * (1 - sigma_next^2 / sigma^2) * RMS(x - D): the rule for text (CLIP).

    A rule of `GradientStep`.
    """

    share: float = 0.02

    def __call__(self, at: StepStart, sigma_next: torch.Tensor) -> torch.Tensor:
        length = self.share * (1 - sigma_next**2 / at.sigma**2) * image_norm(at.x - at.D)
        return zero_where_flat(length * at.gradient / image_norm(at.gradient), at.gradient)


@dataclass(frozen=True)
class FreeDoMLevelStep:
    """`step` * sqrt(1 + sigma_next^2) * g: the rule for parsing maps (0.2) and sketches (20). For `GradientStep`."""

    step: float = 0.2

    def __call__(self, at: StepStart, sigma_next: torch.Tensor) -> torch.Tensor:
        return self.step * (1 + sigma_next**2).sqrt() * at.gradient
