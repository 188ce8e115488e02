"""Schedules of guidance weights: how the weight follows the noise level.

A shape maps a time to the share of the guidance strength w - 1. For most shapes the time is u, the noise level from 0
(lowest of the run) to 1 (highest) on a logarithmic scale; for those in VP_TIME_SHAPES it is t, the time of a DDPM, as
their authors have it. CFG++ is a schedule of another kind: its weights follow from the sizes of the steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser, Wrapper, for_step, levels_of
from edm2kit.guidance.combine import Combination, Guided


def constant(u: float) -> float:
    """The same weight at every noise level."""
    return 1.0


def increasing(u: float) -> float:
    """Full weight at the highest noise level, falling linearly to none at the lowest."""
    return u


def decreasing(u: float) -> float:
    """No guidance at the highest noise level, rising linearly to full weight at the lowest."""
    return 1 - u


def cosine(u: float) -> float:
    """Half a cosine: no guidance at the highest noise level, full weight at the lowest."""
    return (1 + math.cos(math.pi * u)) / 2


def bump(u: float) -> float:
    """Full weight in the middle of the (logarithmic) range of noise levels, no guidance at either end."""
    return math.sin(math.pi * u)


def clamped(u: float) -> float:
    """Like `decreasing`, but at least a quarter of the weight."""
    return max(1 - u, 0.25)


def c2fg(t: float) -> float:
    """The full weight at t = 1 (noise), growing exponentially to twice as much at t = 0: e^(ln 2 (1 - t)).

    C^2FG (arXiv 2603.08155), with the published rate ln 2.
    """
    return 2.0 ** (1 - t)


def triangle(t: float) -> float:
    """Full weight at t = 1/2, falling linearly to none at t = 0 and t = 1. TV-CFG (arXiv 2509.22007)."""
    return 1 - abs(2 * t - 1)


def beta_density(t: float) -> float:
    """The density 6 t (1 - t) of the Beta distribution with both parameters 2, whose mean over t is 1.

    Beta-CFG (arXiv 2502.10574). Other parameters need a function of your own in `WeightSchedule`.
    """
    return 6 * t * (1 - t)


SHAPES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "increasing": increasing,
    "decreasing": decreasing,
    "cosine": cosine,
    "bump": bump,
    "clamped": clamped,
    "c2fg": c2fg,
    "triangle": triangle,
    "beta-density": beta_density,
}
VP_TIME_SHAPES = frozenset({c2fg, triangle, beta_density})
CFG_PLUS_PLUS = "cfg-plus-plus"
SCHEDULES = (*SHAPES, CFG_PLUS_PLUS)


def level_of(sigma: float, sigmas: torch.Tensor) -> float:
    """Position of `sigma` in the range of noise levels of the run, on a logarithmic scale: 0 lowest, 1 highest."""
    low, high = math.log(levels_of(sigmas)[-2]), math.log(levels_of(sigmas)[0])
    if high == low:
        return 1.0
    return min(max((math.log(sigma) - low) / (high - low), 0.0), 1.0)


def vp_time(sigma: float) -> float:
    """The time t at which a DDPM has the noise level `sigma`: 0 without noise, 0.93 at sigma 80, at most 1 (sigma 152).

    Of the variance-preserving diffusion with beta from 0.1 to 20, where 1 + sigma^2 = exp(9.95 t^2 + 0.1 t), which DDPM
    and DiT are trained on. Song et al. 2021; Karras et al. 2022 (EDM), Table 1.
    """
    t = (math.sqrt(0.1**2 + 2 * 19.9 * math.log1p(sigma**2)) - 0.1) / 19.9
    return min(t, 1.0)


@dataclass(frozen=True)
class WeightSchedule(Wrapper):
    """`guided` with the weight 1 + (w - 1) shape(time): `vp_time` for VP_TIME_SHAPES, else `level_of`.

    The weight is set once per step, for predictor and corrector alike, by the nominal noise level. `guided` has a
    method `scaled(share)`, as `Guided` and `Combination` do. Authors multiply w itself; here it is the strength w - 1,
    so that w = 1 is off at all times. Raises ValueError if it is called outside a sampling run.

    Example: `WeightSchedule(Guided(net, weaker_net, 2.0), lambda u: u**2)`.
    """

    guided: Any
    shape: Callable[[float], float]

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
        raise _outside_a_run()

    def for_step(self, i: int, sigmas: torch.Tensor) -> Denoiser:
        sigma = levels_of(sigmas)[i]
        time = vp_time(sigma) if self.shape in VP_TIME_SHAPES else level_of(sigma, sigmas)
        return for_step(self.guided.scaled(self.shape(time)), i, sigmas)


@dataclass(frozen=True)
class CFGPlusPlus(Wrapper):
    """CFG++: the noise that a step puts back is the negative's, and only the denoised image is guided.

    A DDIM step from sigma to s becomes x' = D_neg + lambda (D - D_neg) + (s / sigma) (x - D_neg), which is an Euler
    step with the weight lambda sigma / (sigma - s). So it is a schedule, exact with `euler` without churn; other
    solvers take the same weights. lambda is w - 1; published are lambdas up to 1, and 0.6 as the default (w 1.6). A
    small lambda is not weak guidance, but leads to images of the negative alone: only w = 1 itself is off and gives
    those of the main network.

    Works with autoguidance and any rule, but with one negative only, whose noise is put back. Raises ValueError if
    `guided` is not led away from exactly one negative, if its weight is not in [1, 2], and if it is called outside a
    sampling run. Chung et al. 2024 (arXiv 2406.08070); tested on Stable Diffusion.

    Example: `euler(CFGPlusPlus(Guided(net, weaker_net, 1.6)), noise, karras_sigmas(50, 0.002, 80, 7), labels)`.
    """

    guided: Any

    def __post_init__(self) -> None:
        weights = self._weights()
        if len(weights) != 1:
            raise ValueError(
                f"the schedule {CFG_PLUS_PLUS} puts the noise of one negative back, and this guidance has "
                f"{len(weights)}. Use a single method with a weighted difference, such as autoguidance or cfg"
            )
        if not 1 <= weights[0] <= 2:
            raise ValueError(
                f"the schedule {CFG_PLUS_PLUS} takes weights 1 + lambda from 1 (off) to 2, and the weight is "
                f"{weights[0]:g}; 1.6 is the published one"
            )

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
        raise _outside_a_run()

    def for_step(self, i: int, sigmas: torch.Tensor) -> Denoiser:
        (weight,) = self._weights()
        if weight == 1:
            return for_step(self.guided, i, sigmas)
        sigma, sigma_next = levels_of(sigmas)[i : i + 2]
        return for_step(self._with_weight((weight - 1) * sigma / (sigma - sigma_next)), i, sigmas)

    def _weights(self) -> list[float]:
        if isinstance(self.guided, Guided):
            return [self.guided.weight]
        if isinstance(self.guided, Combination):
            return [negative.weight for negative in self.guided.negatives]
        return []

    def _with_weight(self, weight: float) -> Guided | Combination:
        if isinstance(self.guided, Guided):
            return replace(self.guided, weight=weight)
        (negative,) = self.guided.negatives
        return replace(self.guided, negatives=(replace(negative, weight=weight),))


def with_schedule(guided: Any, name: str, method: str) -> Denoiser:
    """`guided`, made by `method`, under the schedule `name`, one of SCHEDULES.

    Raises ValueError if it has no weight to change.
    """
    if name == CFG_PLUS_PLUS:
        return CFGPlusPlus(guided)
    if not hasattr(guided, "scaled"):
        raise ValueError(f"a schedule needs a weight to change; guidance method {method} has none")
    return WeightSchedule(guided, SHAPES[name])


def _outside_a_run() -> ValueError:
    return ValueError("a weight schedule acts on whole steps: call for_step(i, sigmas) first, as the solvers do")
