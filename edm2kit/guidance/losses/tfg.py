"""Training-free guidance (TFG): one form that holds DPS, FreeDoM, LGD and MPGD as special cases."""

import math
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from edm2kit.denoiser import Denoiser, for_images, for_step
from edm2kit.guidance.losses.lgd import MonteCarlo
from edm2kit.guidance.losses.loss_gradient import check_scale, column, loss_at, slope, slope_at
from edm2kit.guidance.losses.loss_steps import ShiftedStep, refuse_call
from edm2kit.guidance.losses.targets import Loss
from edm2kit.guidance.random_draws import Draws
from edm2kit.torch_utils.rng import StackedGenerator


def increasing(i: int, sigmas: torch.Tensor) -> float:
    """TFG's "increase": in proportion to alpha_t of each step, (1 + sigma_next^2) / (1 + sigma^2), with mean 1."""
    alphas = (1 + sigmas[1:].double() ** 2) / (1 + sigmas[:-1].double() ** 2)
    return (alphas[i] / alphas.mean()).item()


@dataclass(frozen=True)
class Unified:
    """`denoiser`, with x moved after each step by rho (1 + sigma^2) * (gradient of log f by x) + (mu-steps on D).

    log f is minus the loss, averaged over `count` images near D at the deviation gamma * sigma / sqrt(1 + sigma^2);
    the mu-steps are `iterations` steps of size mu up the gradient of log f by D, from D. rho and mu grow along the
    run (`increasing`), and are its means. Ye et al. 2024 (TFG, arXiv 2409.15761), Alg. 1, written for x = y + sigma n;
    meant for Euler steps (deterministic DDIM), its recurrence is `time_travel`. gamma = mu = 0 is FreeDoM and
    DPS, mu = 0 LGD; rho = 0 is MPGD, and then the denoiser is not run backwards. The defaults are those for CIFAR-10.

    With rho = mu = 0 guidance is off, bit for bit. Outside of a sampling run a call raises ValueError.
    """

    denoiser: Denoiser
    loss: Loss
    rho: float = 1.0
    mu: float = 0.25
    gamma: float = 0.001
    iterations: int = 4
    count: int = 1
    draws: Draws = field(default_factory=Draws)

    def __post_init__(self) -> None:
        check_scale(self.rho)
        check_scale(self.mu)
        if not (math.isfinite(self.gamma) and self.gamma >= 0 and self.iterations >= 0):
            raise ValueError(
                f"TFG with gamma {self.gamma} and {self.iterations} iterations; expected finite numbers from 0 up"
            )

    @property
    def is_off(self) -> bool:
        return self.rho == 0 and (self.mu == 0 or self.iterations == 0)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return refuse_call()

    def scaled(self, share: float) -> "Unified":
        """The same, guided by `share` of the strength: 0 is off, 1 as it is."""
        return replace(self, rho=self.rho * share, mu=self.mu * share)

    def for_images(self, rng: StackedGenerator) -> "Unified":
        denoiser = for_images(self.denoiser, rng)
        if self.is_off:
            return replace(self, denoiser=denoiser)
        return replace(self, denoiser=denoiser, loss=for_images(self.loss, rng), draws=self.draws.for_images(rng))

    def for_step(self, i: int, sigmas: torch.Tensor) -> Denoiser:
        inner = for_step(self.denoiser, i, sigmas)
        if self.is_off:
            return inner
        loss, grown = for_step(self.loss, i, sigmas), increasing(i, sigmas)
        if self.gamma > 0:
            loss = MonteCarlo(loss, self.count, r=self._spread, draws=self.draws.for_step(i, sigmas))
        return ShiftedStep(inner, partial(self._look, loss, self.rho * grown, self.mu * grown))

    def _spread(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.gamma * sigma / (1 + sigma**2).sqrt()

    def _look(
        self,
        loss: Loss,
        rho: float,
        mu: float,
        denoiser: Denoiser,
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if rho == 0:
            D, shift = denoiser(x, sigma, labels), torch.zeros_like(x)
        else:
            found = slope(denoiser, loss, x, sigma, labels)
            D, shift = found.D, -rho * (1 + column(sigma, x) ** 2) * found.gradient
        higher = D
        if mu != 0:
            for _ in range(self.iterations):
                higher = higher - mu * slope_at(loss_at(loss, sigma), higher).gradient
        return D, shift + (higher - D)
