"""Steps taken again and again, with fresh noise to go back by: time travel, also called recurrence."""

from dataclasses import dataclass, field

import torch

from edm2kit.denoiser import Denoiser, after_step, for_step
from edm2kit.sampling.churn import NO_CHURN, Churn, RandnLike


@dataclass(frozen=True)
class TimeTravel:
    """How often to take the steps from noise levels in (`sigma_lo`, `sigma_hi`]; all others are taken once.

    The defaults are those of FreeDoM on ImageNet (Yu et al. 2023: t from 500 to 800). Raises ValueError on a number
    below 1 or levels that run backwards.
    """

    times: int = field(
        default=10, metadata={"option": "--travel-times", "help": "How often time-travel takes a step", "min": 1}
    )
    sigma_lo: float = 3.4
    sigma_hi: float = 26.0

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ValueError(f"time travel takes a step {self.times} times; expected at least 1")
        if not 0 <= self.sigma_lo <= self.sigma_hi:
            raise ValueError(f"time travel in ({self.sigma_lo:g}, {self.sigma_hi:g}]; expected 0 <= lo <= hi")

    def times_at(self, sigma: torch.Tensor) -> int:
        """How often to take the step that starts at `sigma`."""
        return self.times if self.sigma_lo < float(sigma) <= self.sigma_hi else 1


FREEDOM = TimeTravel()


@torch.no_grad()
def time_travel(
    denoiser: Denoiser,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    labels: torch.Tensor | None = None,
    randn_like: RandnLike = torch.randn_like,
    churn: Churn = NO_CHURN,
    travel: TimeTravel = FREEDOM,
) -> torch.Tensor:
    """First-order steps, some of them several times over: back from sigma_next to sigma by fresh noise, and again.

    One evaluation for each time a step is taken; to the denoiser each is a step of its own. With an exact denoiser the
    way back leaves the distribution of x as it was. Other arguments as in `solvers.heun`. Lugmayr et al. 2022
    (RePaint), Sec. 4.2; Yu et al. 2023 (FreeDoM), Alg. 2.
    """
    x = noise.to(sigmas.dtype) * sigmas[0]
    for i in range(len(sigmas) - 1):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        for left in reversed(range(travel.times_at(sigma))):
            D = for_step(denoiser, i, sigmas)
            x, sigma_hat = churn.raise_noise(x, i, sigmas, randn_like)
            d = (x - D(x, sigma_hat, labels).to(x.dtype)) / sigma_hat
            x = after_step(D, x + (sigma_next - sigma_hat) * d, i, sigmas)
            if left:
                x = x + (sigma**2 - sigma_next**2).sqrt() * randn_like(x)
    return x
