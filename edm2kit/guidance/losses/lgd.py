"""The loss not of the denoised image alone but of all clean images near it: loss-guided diffusion (LGD).

Song et al. 2023 (Loss-Guided Diffusion Models for Plug-and-Play Controllable Generation). What lies near is a
Gaussian around D whose deviation, for data of deviation sigma_data, is c_out. Without this the guided samples of a
Gaussian do not reach its posterior.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.losses.loss_gradient import c_out, column
from edm2kit.guidance.losses.targets import Loss, Measurement
from edm2kit.guidance.random_draws import Draws
from edm2kit.torch_utils.rng import StackedGenerator

Spread = Callable[[torch.Tensor], torch.Tensor]  # sigma -> deviation of clean images around D


@dataclass(frozen=True)
class Exact:
    """The average in closed form, for measurements whose operator allows it."""

    loss: Measurement
    sigma_data: float = 0.5

    def at(self, sigma: torch.Tensor) -> Loss:
        return partial(self.loss, r=c_out(torch.as_tensor(sigma), self.sigma_data))

    def __call__(self, D: torch.Tensor) -> torch.Tensor:
        return self.loss(D)


@dataclass(frozen=True)
class MonteCarlo:
    """The average drawn: -log of the mean of exp(-loss(D + r z)) over `count` draws z of each image.

    `r` is a function of sigma, c_out unless given. The draws are each image's own, and stay the same through a step.
    Called without a noise level, the loss is that of D itself.
    """

    loss: Loss
    count: int
    sigma_data: float = 0.5
    r: Spread | None = None
    draws: Draws = field(default_factory=Draws)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a Monte-Carlo average over {self.count} draws; expected at least 1")

    def at(self, sigma: torch.Tensor) -> Loss:
        sigma = torch.as_tensor(sigma)
        return partial(self._average, c_out(sigma, self.sigma_data) if self.r is None else self.r(sigma))

    def __call__(self, D: torch.Tensor) -> torch.Tensor:
        return self.loss(D)

    def _average(self, r: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
        z = self.draws.source().randn([len(D), self.count, *D.shape[1:]], dtype=D.dtype).to(D.device)
        losses = torch.stack([self.loss(D + column(r, D) * z[:, k]) for k in range(self.count)])
        return math.log(self.count) - torch.logsumexp(-losses, dim=0)

    def for_images(self, rng: StackedGenerator) -> "MonteCarlo":
        return replace(self, loss=for_images(self.loss, rng), draws=self.draws.for_images(rng))

    def for_step(self, i: int, sigmas: torch.Tensor) -> "MonteCarlo":
        return replace(self, loss=for_step(self.loss, i, sigmas), draws=self.draws.for_step(i, sigmas))
