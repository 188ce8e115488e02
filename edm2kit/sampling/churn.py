"""Noise added along the way, which makes a solver of the ODE one of an SDE."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

RandnLike = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Churn:
    """Noise added before each step, as in Karras et al. 2022 (EDM), Alg. 2; the default is none.

    `S_churn` is spread over the steps whose sigma lies in [S_min, S_max]; `S_noise` scales the noise added.
    Raises ValueError on a negative or undefined setting. The metadata of a field describes its command-line option.
    """

    S_churn: float = field(
        default=0.0, metadata={"option": "--S_churn", "help": "Amount of added noise; 0: none", "min": 0}
    )
    S_min: float = field(
        default=0.0, metadata={"option": "--S_min", "help": "Lowest noise level that gets noise", "min": 0}
    )
    S_max: float = field(
        default=math.inf, metadata={"option": "--S_max", "help": "Highest noise level that gets noise", "min": 0}
    )
    S_noise: float = field(default=1.0, metadata={"option": "--S_noise", "help": "Scale of the added noise", "min": 0})

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"{name} is {value:g}; expected a number of at least 0")

    def raise_noise(
        self, x: torch.Tensor, i: int, sigmas: torch.Tensor, randn_like: RandnLike
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` and its noise level at the start of step i, after the noise level was raised."""
        sigma, num_steps = sigmas[i], len(sigmas) - 1
        if self.S_churn == 0 or not self.S_min <= float(sigma) <= self.S_max:
            return x, sigma
        sigma_hat = sigma * (1 + min(self.S_churn / num_steps, math.sqrt(2) - 1))
        return x + self.S_noise * (sigma_hat**2 - sigma**2).sqrt() * randn_like(x), sigma_hat


NO_CHURN = Churn()
