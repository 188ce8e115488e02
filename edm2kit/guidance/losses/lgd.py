"""Loss-guided diffusion (LGD): the loss averaged over clean images near the denoised one.

Song et al. 2023 (Loss-Guided Diffusion Models for Plug-and-Play Controllable Generation). The images near D are taken
from a Gaussian around it, whose standard deviation is c_out for data of deviation sigma_data: sigma sigma_d /
sqrt(sigma^2 + sigma_d^2). The paper's sigma / sqrt(1 + sigma^2) is the same for data of unit variance; the networks of
this package have sigma_data = 0.5, for which the paper's spread would be up to twice too wide. Without the average, the
guided samples of a Gaussian do not reach its posterior.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from edm2kit.denoiser import Wrapper
from edm2kit.guidance.losses.gradient import c_out, column
from edm2kit.guidance.losses.loss import Loss
from edm2kit.guidance.losses.restoration import Measurement
from edm2kit.guidance.step_generators import StepGenerators

Spread = Callable[[torch.Tensor], torch.Tensor]  # sigma -> standard deviation of clean images around D


@dataclass(frozen=True)
class ClosedFormAverage:
    """The average in closed form, for measurements with a `row_energy`."""

    loss: Measurement
    sigma_data: float = 0.5

    def at(self, sigma: torch.Tensor) -> Loss:
        return partial(self.loss, r=c_out(torch.as_tensor(sigma), self.sigma_data))

    def __call__(self, D: torch.Tensor) -> torch.Tensor:
        return self.loss(D)


@dataclass(frozen=True)
class MonteCarloAverage(Wrapper):
    """The average by sampling: -log of the mean of exp(-loss(D + r z)) over `count` random z per image.

    `r` is a function of sigma, c_out unless given. Each image has its own random numbers, the same throughout a step.
    Called without a noise level, the loss is that of D itself. Raises ValueError for a count below 1.
    """

    loss: Loss
    count: int
    sigma_data: float = 0.5
    r: Spread | None = None
    random: StepGenerators = field(default_factory=StepGenerators)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a Monte Carlo average over {self.count} samples; expected at least 1")

    def at(self, sigma: torch.Tensor) -> Loss:
        sigma = torch.as_tensor(sigma)
        r = c_out(sigma, self.sigma_data) if self.r is None else self.r(sigma)

        def average(D: torch.Tensor) -> torch.Tensor:
            z = self.random.generators().randn([len(D), self.count, *D.shape[1:]], dtype=D.dtype).to(D.device)
            losses = torch.stack([self.loss(D + column(r, D) * z[:, k]) for k in range(self.count)])
            return math.log(self.count) - torch.logsumexp(-losses, dim=0)

        return average

    def __call__(self, D: torch.Tensor) -> torch.Tensor:
        return self.loss(D)
