"""Noise levels of a sampling run, from a formula, a published table or the denoiser itself; and churn, added noise."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser, after_step, for_step, levels_of, move_levels

MAX_STEPS = 100_000
RandnLike = Callable[[torch.Tensor], torch.Tensor]


def karras_sigmas(
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Noise levels that fall from `sigma_max` to `sigma_min`, evenly spaced in sigma^(1/rho), followed by 0.

    Returns [num_steps + 1], computed in float64 and rounded to `dtype`; a single step goes from `sigma_max` to 0.
    Raises ValueError if the levels would not fall. Karras et al. 2022 (EDM), Eq. 5.

    Example: `karras_sigmas(32, 0.002, 80, 7)`
    """
    if not 1 <= num_steps <= MAX_STEPS:
        raise ValueError(f"steps is {num_steps}; expected 1 to {MAX_STEPS}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min is {sigma_min:g} and sigma_max {sigma_max:g}; expected 0 < sigma_min < sigma_max")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho is {rho:g}; expected a number above 0")
    # on the CPU, because some accelerators have no float64
    fraction = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (first + fraction * (last - first)) ** rho
    return move_levels(torch.cat([sigmas, sigmas.new_zeros(1)]).to(dtype), device)


# Sabour et al. 2024, "Align Your Steps" (arXiv 2404.14507): the published levels for 10 steps
AYS: dict[str, tuple[float, ...]] = {
    "ays-sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152),
    "ays-sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113),
    "ays-svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034),
}
TEACHER_STEPS = 60  # of GITS
LEVELS = ("karras", *AYS, "gits", "own")  # names of schedules


def ays_sigmas(
    table: str,
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The levels of a published table (a key of AYS), from `sigma_max` to `sigma_min`, followed by 0.

    Other numbers of steps than 10 interpolate log(sigma) linearly, as the authors recommend. Then log(sigma) is
    stretched to the two ends; with those of the table, the levels are the published ones. Tables were optimized for
    other networks: latents of half their standard deviation, as EDM2's are of Stable Diffusion's, call for half the
    levels. Returns [num_steps + 1]. Raises ValueError if the levels would not fall. Sabour et al. 2024 (AYS).

    Example: `ays_sigmas("ays-sd15", 10, 0.152 / 2, 14.615 / 2)`
    """
    karras_sigmas(num_steps, sigma_min, sigma_max, 1.0)  # refuses what does not fall
    logs = np.log(AYS[table])
    logs = np.interp(np.linspace(0, 1, num_steps), np.linspace(0, 1, len(logs)), logs)
    if num_steps > 1:
        logs = (logs - logs[-1]) / (logs[0] - logs[-1])
    else:
        logs = np.ones(1)
    levels = sigma_min * (sigma_max / sigma_min) ** logs
    return listed_sigmas(levels.tolist(), dtype, device)


def listed_sigmas(
    levels: Sequence[float], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """`levels` followed by 0. Raises ValueError if they do not fall, or one is not a finite number above 0.

    Example: `listed_sigmas([80, 10, 2, 0.5, 0.1, 0.002])`
    """
    falls = all(high > low for high, low in itertools.pairwise(levels))
    if not levels or not falls or not all(0 < level < math.inf for level in levels):
        raise ValueError(f"the noise levels {', '.join(f'{level:g}' for level in levels)} do not fall; each above 0")
    return move_levels(torch.tensor([*levels, 0.0], dtype=torch.float64).to(dtype), device)


def parse_levels(text: str) -> str | tuple[float, ...]:
    """A name in LEVELS, or noise levels separated by commas. Raises ValueError if the text is neither."""
    if text in LEVELS:
        return text
    try:
        levels = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r:.60} is not a list of noise levels, nor one of {', '.join(LEVELS)}") from None
    listed_sigmas(levels)
    return levels


@torch.no_grad()
def euler_deviations(
    denoiser: Denoiser, noise: torch.Tensor, condition: ConditionLike, teacher: torch.Tensor
) -> np.ndarray:
    """How far one Euler step from level i to level j goes astray, float64 [M, M]; infinite unless i < j.

    `teacher` [M + 1] are fine noise levels that end with 0. The deviation is the distance from the teacher's point at
    level j, on trajectories of M Euler steps from `noise` [N,C,H,W] of unit variance: the mean over the images.
    """
    x = noise.to(teacher.dtype) * teacher[0]
    points, slopes = [], []
    for i in range(len(teacher) - 1):
        D = for_step(denoiser, i, teacher)
        d = (x - D(x, teacher[i], condition).to(x.dtype)) / teacher[i]
        points.append(x)
        slopes.append(d)
        x = after_step(D, x + (teacher[i + 1] - teacher[i]) * d, i, teacher)
    count = len(points)
    deviations = np.full([count, count], math.inf)
    for i in range(count):
        for j in range(i + 1, count):
            off = points[i] + (teacher[j] - teacher[i]) * slopes[i] - points[j]
            deviations[i, j] = float(off.flatten(1).norm(dim=1).mean())
    return deviations


def gits_sigmas(
    deviations: np.ndarray, num_steps: int, teacher: torch.Tensor, coefficient: float = 1.15
) -> torch.Tensor:
    """`num_steps` of the teacher's noise levels between which Euler steps go least astray, followed by 0.

    `deviations` [M, M] are those of `euler_deviations` for the levels `teacher` [M + 1]. Dynamic programming finds the
    levels of the least total deviation, in which each later step counts `coefficient` times more. The first level and
    the last one above 0 are always among them. Returns [num_steps + 1], in the dtype of `teacher`. Raises ValueError
    unless num_steps is from 2 to M. Chen et al. 2024 (GITS, arXiv 2405.11326).

    Example: `gits_sigmas(euler_deviations(net, noise, labels, teacher), 10, teacher)`
    """
    count = len(teacher) - 1
    if not 2 <= num_steps <= count:
        raise ValueError(f"steps is {num_steps}; GITS expected 2 to {count}, the number of its teacher's steps")
    path = _cheapest_path(deviations, num_steps - 1, coefficient)
    return torch.cat([teacher[path], teacher[-1:]])


def _cheapest_path(cost: np.ndarray, steps: int, coefficient: float) -> list[int]:
    """The nodes of the cheapest path from the first to the last in `steps` steps; `cost` [M, M] is inf backwards."""
    best = cost[:, -1]  # from each node to the end, in one step
    choices: list[np.ndarray] = []
    for _ in range(steps - 1):
        totals = cost + coefficient * best[None, :]
        choices.append(totals.argmin(axis=1))
        best = totals.min(axis=1)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return [*path, len(cost) - 1]


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

    def raises_noise(self, i: int, sigmas: torch.Tensor) -> bool:
        """Whether step i gets noise."""
        return self.S_churn != 0 and self.S_min <= levels_of(sigmas)[i] <= self.S_max

    def raise_noise(
        self, x: torch.Tensor, i: int, sigmas: torch.Tensor, randn_like: RandnLike
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` at the start of step i with noise added, and its new noise level."""
        sigma, num_steps = sigmas[i], len(sigmas) - 1
        if not self.raises_noise(i, sigmas):
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
