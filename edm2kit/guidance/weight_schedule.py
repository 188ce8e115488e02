"""Schedules of guidance weights: how the weight follows the noise level.

Each function maps u, the noise level from 0 (lowest of the run) to 1 (highest) on a logarithmic scale, to the share of
the guidance strength.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser, Wrapper, for_step


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


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "increasing": increasing,
    "decreasing": decreasing,
    "cosine": cosine,
    "bump": bump,
    "clamped": clamped,
}


def level_of(sigma: float, sigmas: torch.Tensor) -> float:
    """Position of `sigma` in the range of noise levels of the run, on a logarithmic scale: 0 lowest, 1 highest."""
    low, high = math.log(float(sigmas[-2])), math.log(float(sigmas[0]))
    if high == low:
        return 1.0
    return min(max((math.log(sigma) - low) / (high - low), 0.0), 1.0)


@dataclass(frozen=True)
class WeightSchedule(Wrapper):
    """`guided` with the weight 1 + (w - 1) shape(u), u from 0 at the lowest noise level to 1 at the highest.

    The weight is set once per step, for predictor and corrector alike, by the nominal noise level. `guided` has a
    method `scaled(share)`, as `Guided` and `Combination` do. Raises ValueError if it is called outside a sampling run.
    """

    guided: Any
    shape: Callable[[float], float]

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
        raise ValueError("a weight schedule acts on whole steps: call for_step(i, sigmas) first, as the solvers do")

    def for_step(self, i: int, sigmas: torch.Tensor) -> Denoiser:
        share = self.shape(level_of(float(sigmas[i]), sigmas))
        return for_step(self.guided.scaled(share), i, sigmas)
