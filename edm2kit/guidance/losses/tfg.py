"""Training-free guidance (TFG): one form that contains DPS, FreeDoM, LGD and MPGD as special cases."""

import math
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser, Wrapper, for_step, levels_of
from edm2kit.guidance.losses.gradient import column, slope, slope_at
from edm2kit.guidance.losses.gradient_step import ShiftAtStepEnd, refuse_call
from edm2kit.guidance.losses.lgd import MonteCarloAverage
from edm2kit.guidance.losses.loss import Loss, loss_at
from edm2kit.guidance.losses.score import check_scale
from edm2kit.guidance.step_generators import StepGenerators


def increasing(i: int, sigmas: torch.Tensor) -> float:
    """TFG's "increase": in proportion to alpha_t of each step, (1 + sigma_next^2) / (1 + sigma^2), with mean 1."""
    levels = torch.tensor(levels_of(sigmas), dtype=torch.float64)  # on the CPU: an Apple GPU has no float64
    alphas = (1 + levels[1:] ** 2) / (1 + levels[:-1] ** 2)
    return (alphas[i] / alphas.mean()).item()


@dataclass(frozen=True)
class TFG(Wrapper):
    """`denoiser`, with x moved after each step by rho (1 + sigma^2) * (gradient of log f by x) + (mu-steps on D).

    log f is minus the loss, averaged over `count` images near D at the deviation gamma * sigma / sqrt(1 + sigma^2); the
    mu-steps are `iterations` steps of size mu up the gradient of log f by D, starting from D. rho and mu grow along the
    run (`increasing`); the given values are their means. Ye et al. 2024 (TFG, arXiv 2409.15761), Alg. 1, written for
    x = y + sigma n; meant for Euler steps (deterministic DDIM). Its recurrence is the solver `time-travel`.
    gamma = mu = 0 is FreeDoM and DPS, mu = 0 LGD; rho = 0 is MPGD, without a backward pass through the denoiser. The
    defaults are those for CIFAR-10.

    With rho = mu = 0 guidance is off, bit for bit. Raises ValueError for values that are not finite or negative counts,
    and if it is called outside a sampling run.
    """

    denoiser: Denoiser
    loss: Loss
    rho: float = 1.0
    mu: float = 0.25
    gamma: float = 0.001
    iterations: int = 4
    count: int = 1
    random: StepGenerators = field(default_factory=StepGenerators)

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

    def idle_fields(self) -> frozenset[str]:
        return frozenset({"loss", "random"}) if self.is_off else frozenset()

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
        return refuse_call()

    def scaled(self, share: float) -> "TFG":
        """The same with `share` of the strength: 0 is off, 1 as it is."""
        return replace(self, rho=self.rho * share, mu=self.mu * share)

    def for_step(self, i: int, sigmas: torch.Tensor) -> Denoiser:
        inner = for_step(self.denoiser, i, sigmas)
        if self.is_off:
            return inner
        loss, growth = for_step(self.loss, i, sigmas), increasing(i, sigmas)
        if self.gamma > 0:
            random = self.random.for_step(i, sigmas)
            loss = MonteCarloAverage(loss, self.count, r=self.spread, random=random)
        return ShiftAtStepEnd(inner, partial(self._evaluate, loss, self.rho * growth, self.mu * growth))

    def spread(self, sigma: torch.Tensor) -> torch.Tensor:
        """Standard deviation of the images near D that the loss is averaged over."""
        return self.gamma * sigma / (1 + sigma**2).sqrt()

    def _evaluate(
        self,
        loss: Loss,
        rho: float,
        mu: float,
        denoiser: Denoiser,
        x: torch.Tensor,
        sigma: torch.Tensor,
        condition: ConditionLike,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if rho == 0:
            D, shift = denoiser(x, sigma, condition), torch.zeros_like(x)
        else:
            found = slope(denoiser, loss, x, sigma, condition)
            D, shift = found.D, -rho * (1 + column(sigma, x) ** 2) * found.gradient
        higher = D
        if mu != 0:
            for _ in range(self.iterations):
                higher = higher - mu * slope_at(loss_at(loss, sigma), higher).gradient
        return D, shift + (higher - D)
