"""Guidance at some noise levels only."""

from dataclasses import dataclass

import torch

from edm2kit.denoiser import Denoiser, for_images, for_step
from edm2kit.torch_utils.rng import StackedGenerator


def guided_steps(sigmas: torch.Tensor, sigma_lo: float, sigma_hi: float) -> range:
    """The steps i whose sigmas[i] lies in (sigma_lo, sigma_hi], after both ends moved to the nearest noise level.

    Published ends are rounded noise levels of the schedule: "(0.28, 2.90]" means (0.28304, 2.90153], steps 15 to
    21 of 32, while comparing with the rounded numbers gives steps 16 to 22. `sigma_hi` may be infinite. Raises
    ValueError on an interval that runs backwards.
    """
    if not 0 <= sigma_lo <= sigma_hi:
        raise ValueError(f"the guidance interval is ({sigma_lo:g}, {sigma_hi:g}]; expected 0 <= lo <= hi")
    levels = sigmas.tolist()

    def nearest(sigma: float) -> int:
        inside = min(sigma, levels[0])
        return min(range(len(levels)), key=lambda i: abs(levels[i] - inside))

    return range(nearest(sigma_hi), nearest(sigma_lo))


@dataclass(frozen=True)
class GuidanceInterval:
    """`guided` in the steps from `sigma_hi` down to `sigma_lo`, `unguided` in all others.

    The choice is made once per step, for predictor and corrector alike, on the nominal noise levels (also with
    churn). Kynkäänniemi et al. 2024 (arXiv 2404.07724). Outside of a sampling run, where no step is known, a call
    raises ValueError.
    """

    guided: Denoiser
    unguided: Denoiser
    sigma_lo: float
    sigma_hi: float

    def __post_init__(self) -> None:
        guided_steps(torch.zeros(1), self.sigma_lo, self.sigma_hi)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        raise ValueError("a guidance interval acts on whole steps: call for_step(i, sigmas) first, as the solvers do")

    def for_images(self, rng: StackedGenerator) -> "GuidanceInterval":
        guided, unguided = for_images(self.guided, rng), for_images(self.unguided, rng)
        return GuidanceInterval(guided, unguided, self.sigma_lo, self.sigma_hi)

    def for_step(self, i: int, sigmas: torch.Tensor) -> Denoiser:
        inside = i in guided_steps(sigmas, self.sigma_lo, self.sigma_hi)
        return for_step(self.guided if inside else self.unguided, i, sigmas)
