"""Noise added before the steps of a solver, and the checks that settings of solvers share."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

RandnLike = Callable[[torch.Tensor], torch.Tensor]


def refuse_negative(settings: Any) -> None:
    """Raise ValueError, naming the field, if a field of the dataclass `settings` is negative or NaN."""
    for name, value in asdict(settings).items():
        if not value >= 0:  # also refuses NaN
            raise ValueError(f"{name} is {value:g}; expected a number of at least 0")


@dataclass(frozen=True)
class Churn:
    """Noise added before each step, which turns a solver of the ODE into one of an SDE; none by default.

    `S_churn` is spread over the steps with sigma in [S_min, S_max]; `S_noise` scales the added noise. Raises
    ValueError on a negative setting. The metadata of a field describes its command-line option. Karras et al. 2022
    (EDM), Alg. 2.
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
        refuse_negative(self)

    def raise_noise(
        self, x: torch.Tensor, i: int, sigmas: torch.Tensor, randn_like: RandnLike
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` at the start of step i with noise added, and its new noise level."""
        sigma, num_steps = sigmas[i], len(sigmas) - 1
        if self.S_churn == 0 or not self.S_min <= float(sigma) <= self.S_max:
            return x, sigma
        sigma_hat = sigma * (1 + min(self.S_churn / num_steps, math.sqrt(2) - 1))
        return x + self.S_noise * (sigma_hat**2 - sigma**2).sqrt() * randn_like(x), sigma_hat


NO_CHURN = Churn()


def refuse_churn(solver: str, churn: Churn) -> None:
    """Raise ValueError if `churn` adds noise, for solvers that combine evaluations of several steps."""
    if churn.S_churn != 0:
        raise ValueError(
            f"the solver {solver} combines evaluations of several steps, which added noise would make inconsistent; "
            "leave out S_churn, or use heun or euler"
        )
