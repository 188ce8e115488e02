"""Guidance weights that follow the noise level."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from edm2kit.denoiser import Denoiser, for_images, for_step
from edm2kit.torch_utils.rng import StackedGenerator


def constant(u: float) -> float:
    """The same weight at every noise level."""
    return 1.0


def increasing(u: float) -> float:
    """From full weight at the highest noise level, straight down to none at the lowest."""
    return u


def decreasing(u: float) -> float:
    """From no guidance at the highest noise level, straight up to full weight at the lowest."""
    return 1 - u


def cosine(u: float) -> float:
    """Half a cosine: none at the highest noise level, full weight at the lowest."""
    return (1 + math.cos(math.pi * u)) / 2


def bump(u: float) -> float:
    """Full weight in the middle of the (logarithmic) range of noise levels, none at either end."""
    return math.sin(math.pi * u)


def clamped(u: float) -> float:
    """`decreasing`, but never less than a quarter."""
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
    """Where `sigma` lies in the run's range of noise levels, in logarithms: 0 the lowest, 1 the highest."""
    low, high = math.log(float(sigmas[-2])), math.log(float(sigmas[0]))
    return 1.0 if high == low else min(max((math.log(sigma) - low) / (high - low), 0.0), 1.0)


@dataclass(frozen=True)
class WeightSchedule:
    """`guided` with the weight 1 + (w - 1) shape(u), u from 0 at the lowest noise level to 1 at the highest.

    The weight is set once per step, for predictor and corrector alike, by the nominal noise level. `guided` has a
    method `scaled(share)`, as `Guided` and `Combined`. Outside of a sampling run a call raises ValueError.
    """

    guided: Any
    shape: Callable[[float], float]

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        raise ValueError("a weight schedule acts on whole steps: call for_step(i, sigmas) first, as the solvers do")

    def for_images(self, rng: StackedGenerator) -> "WeightSchedule":
        return WeightSchedule(for_images(self.guided, rng), self.shape)

    def for_step(self, i: int, sigmas: torch.Tensor) -> Denoiser:
        return for_step(self.guided.scaled(self.shape(level_of(float(sigmas[i]), sigmas))), i, sigmas)
