"""Towards what a loss asks for, by a push after each step: how far is a rule of its own."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from edm2kit.denoiser import Denoiser, after_step, for_images, for_step
from edm2kit.guidance.losses.loss_gradient import check_scale, column, slope
from edm2kit.guidance.losses.targets import Loss
from edm2kit.torch_utils.rng import StackedGenerator

_FLAT = 1e-6  # gradients shorter than this have no direction


class Point(NamedTuple):
    """Where a step started: x, sigma [N or 1,1,1,1] and D there, the loss [N] of D and its gradient by x."""

    x: torch.Tensor
    sigma: torch.Tensor
    D: torch.Tensor
    loss: torch.Tensor
    gradient: torch.Tensor


# (where the step started, the noise level it goes to) -> what to take from x at its end
Rule = Callable[[Point, torch.Tensor], torch.Tensor]


def _length(x: torch.Tensor) -> torch.Tensor:
    """The norm of each image, never across the batch, [N,1,1,1]."""
    return column(torch.linalg.vector_norm(x.flatten(1), dim=1), x)


def _where_steep(shift: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return torch.where(_length(gradient) < _FLAT, torch.zeros_like(shift), shift)


@dataclass(frozen=True)
class ResidualStep:
    """`step` * g / sqrt(loss): with a sum of squares as the loss, what DPS takes (Chung et al. 2023, Alg. 1)."""

    step: float = 1.0

    def __call__(self, at: Point, sigma_next: torch.Tensor) -> torch.Tensor:
        return _where_steep(self.step * at.gradient / column(at.loss, at.x).sqrt(), at.gradient)


@dataclass(frozen=True)
class LevelStep:
    """`step` * sqrt(1 + sigma_next^2) * g: FreeDoM's rule for parsing maps (0.2) and sketches (20)."""

    step: float = 0.2

    def __call__(self, at: Point, sigma_next: torch.Tensor) -> torch.Tensor:
        return self.step * (1 + sigma_next**2).sqrt() * at.gradient


@dataclass(frozen=True)
class NoiseStep:
    """Along g, of RMS `share` * (1 - sigma_next^2 / sigma^2) * RMS(x - D): FreeDoM's rule for text (CLIP)."""

    share: float = 0.02

    def __call__(self, at: Point, sigma_next: torch.Tensor) -> torch.Tensor:
        length = self.share * (1 - sigma_next**2 / at.sigma**2) * _length(at.x - at.D)
        return _where_steep(length * at.gradient / _length(at.gradient), at.gradient)


@dataclass(frozen=True)
class PolyakStep:
    """`step` * ||(x - D) / sigma|| * g / ||g||^2, as the code of Shen et al. 2024 (arXiv 2403.12404) has it.

    It depends on the unit of the loss; `TruePolyakStep` does not.
    """

    step: float = 0.1

    def __call__(self, at: Point, sigma_next: torch.Tensor) -> torch.Tensor:
        noise = _length(at.x - at.D) / at.sigma
        return _where_steep(self.step * noise * at.gradient / _length(at.gradient) ** 2, at.gradient)


@dataclass(frozen=True)
class TruePolyakStep:
    """(loss - lowest) * g / ||g||^2, Polyak's own: a loss that is affine in x falls to `lowest` in one step."""

    lowest: float = 0.0

    def __call__(self, at: Point, sigma_next: torch.Tensor) -> torch.Tensor:
        left = column((at.loss - self.lowest).clamp_min(0), at.x)
        return _where_steep(left * at.gradient / _length(at.gradient) ** 2, at.gradient)


# (denoiser, x, sigma, labels) -> D, and what to add to x at the step's end
Look = Callable[
    [Denoiser, torch.Tensor, torch.Tensor, torch.Tensor | None],
    tuple[torch.Tensor, torch.Tensor],
]


class ShiftedStep:
    """One step of a denoiser that answers as before, while x is moved at the step's end.

    `look` is asked once, at the step's first evaluation.
    """

    def __init__(self, denoiser: Denoiser, look: Look):
        self._denoiser, self._look, self._shift = denoiser, look, None

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        if self._shift is not None:
            return self._denoiser(x, sigma, labels)
        D, self._shift = self._look(self._denoiser, x, sigma, labels)
        return D

    def after_step(self, x: torch.Tensor, i: int, sigmas: torch.Tensor) -> torch.Tensor:
        x = after_step(self._denoiser, x, i, sigmas)
        return x if self._shift is None else x + self._shift.to(x.dtype)


def refuse_call() -> torch.Tensor:
    """Raise ValueError: a method that moves x acts on whole steps."""
    raise ValueError("this method moves x after each step: call for_step(i, sigmas) first, as the solvers do")


@dataclass(frozen=True)
class Pushed:
    """`denoiser`, with x pushed against the gradient of the loss after each step: x - scale * rule(point, sigma_next).

    The gradient is taken at the step's start, once per step; the other evaluations cost what they did. `loss` and
    `backprop` as in `LossGuided`. At scale 0 guidance is off, bit for bit, and the loss is never called. Outside of a
    sampling run a call raises ValueError.
    """

    denoiser: Denoiser
    loss: Loss
    rule: Rule
    scale: float = 1.0
    backprop: bool = True
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return refuse_call()

    def scaled(self, share: float) -> "Pushed":
        """The same, guided by `share` of the strength: 0 is off, 1 as it is."""
        return replace(self, scale=self.scale * share)

    def for_images(self, rng: StackedGenerator) -> "Pushed":
        loss = for_images(self.loss, rng) if self.scale else self.loss
        return replace(self, denoiser=for_images(self.denoiser, rng), loss=loss)

    def for_step(self, i: int, sigmas: torch.Tensor) -> Denoiser:
        inner = for_step(self.denoiser, i, sigmas)
        if self.scale == 0:
            return inner
        loss = for_step(self.loss, i, sigmas)
        return ShiftedStep(inner, partial(self._look, loss, sigmas[i + 1]))

    def _look(
        self,
        loss: Loss,
        sigma_next: torch.Tensor,
        denoiser: Denoiser,
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = slope(denoiser, loss, x, sigma, labels, self.backprop, self.sigma_data)
        return found.D, -self.scale * self.rule(Point(x, column(sigma, x), *found), sigma_next)
