"""Guidance in an interval of noise levels only."""

from dataclasses import dataclass

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser, Wrapper, for_step, levels_of


def guided_steps(sigmas: torch.Tensor, sigma_lo: float, sigma_hi: float) -> range:
    """The steps i with sigmas[i] in (sigma_lo, sigma_hi], after both ends have moved to the nearest noise level.

    Published ends are rounded noise levels of the schedule: "(0.28, 2.90]" means (0.28304, 2.90153], steps 15 to 21 of
    32, while comparing with the rounded numbers would give steps 16 to 22. `sigma_hi` may be infinite. Raises
    ValueError if the interval runs backwards.
    """
    if not 0 <= sigma_lo <= sigma_hi:
        raise ValueError(f"the guidance interval is ({sigma_lo:g}, {sigma_hi:g}]; expected 0 <= lo <= hi")
    levels = levels_of(sigmas)

    def nearest(sigma: float) -> int:
        inside = min(sigma, levels[0])
        return min(range(len(levels)), key=lambda i: abs(levels[i] - inside))

    return range(nearest(sigma_hi), nearest(sigma_lo))


@dataclass(frozen=True)
class GuidanceInterval(Wrapper):
    """`guided` in the steps from `sigma_hi` down to `sigma_lo`, `unguided` in all others.

    The choice is made once per step, for predictor and corrector alike, on the nominal noise levels (also with churn).
    Kynkäänniemi et al. 2024 (arXiv 2404.07724). Raises ValueError if it is called outside a sampling run, where the
    step is not known.

    Example: `GuidanceInterval(Guided(net, weaker_net, 2.0), net, 0.28, 2.90)`.
    """

    guided: Denoiser
    unguided: Denoiser
    sigma_lo: float
    sigma_hi: float

    def __post_init__(self) -> None:
        guided_steps(torch.zeros(1), self.sigma_lo, self.sigma_hi)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
        raise ValueError("a guidance interval acts on whole steps: call for_step(i, sigmas) first, as the solvers do")

    def for_step(self, i: int, sigmas: torch.Tensor) -> Denoiser:
        inside = i in guided_steps(sigmas, self.sigma_lo, self.sigma_hi)
        return for_step(self.guided if inside else self.unguided, i, sigmas)
