"""Loss guidance by a step along the gradient after each step of the solver: what DPS, FreeDoM and Polyak share.

How far the step goes is a rule of its own (`StepRule`): dps.py, freedom.py, polyak.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser, Wrapper, after_step, for_step
from edm2kit.guidance.losses.gradient import column, slope
from edm2kit.guidance.losses.loss import Loss
from edm2kit.guidance.losses.mpgd import slope_without_backprop
from edm2kit.guidance.losses.score import check_scale


class StepStart(NamedTuple):
    """The start of a step: x, sigma [N or 1, 1, 1, 1] and D there, the loss [N] of D and its gradient by x."""

    x: torch.Tensor
    sigma: torch.Tensor
    D: torch.Tensor
    loss: torch.Tensor
    gradient: torch.Tensor


# (the start of the step, the noise level it goes to) -> what to subtract from x at its end
StepRule = Callable[[StepStart, torch.Tensor], torch.Tensor]


def image_norm(x: torch.Tensor) -> torch.Tensor:
    """The norm of each image, never across the batch: [N, 1, 1, 1]. Values whose squares underflow count, too."""
    largest = x.flatten(1).abs().amax(dim=1)
    scaled = x.flatten(1) / torch.where(largest > 0, largest, 1)[:, None]
    return column(largest * torch.linalg.vector_norm(scaled, dim=1), x)


def norm_slope(at: StepStart) -> torch.Tensor:
    """The gradient of sqrt(loss) by x: that of the residual's norm ||r||, for a loss that is the sum of its squares.

    Published rules differentiate the norm; gradient / (2 sqrt(loss)) is it. Zero for images without a slope. Raises
    ValueError if the loss is negative, which no square is. On a GPU the slope of a negative loss is NaN instead, as
    looking at the loss would make the host wait in each step; such images are refused later.
    """
    if at.loss.device.type == "cpu" and bool((at.loss < 0).any()):
        raise ValueError(
            "this step needs a loss that is a square, and the loss is negative; use --loss-rule score or freedom"
        )
    return zero_where_flat(at.gradient / (2 * column(at.loss, at.x).sqrt()), at.gradient)


def zero_where_flat(shift: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """`shift`, or zero for images whose gradient is exactly zero.

    However short, a gradient has a direction: the unit of the loss, and the noise level, which shrinks the slope of a
    denoiser as 1 / sigma^2, decide how long it is.
    """
    return torch.where(image_norm(gradient) == 0, torch.zeros_like(shift), shift)


# (denoiser, x, sigma, condition) -> D, and what to add to x at the end of the step
ShiftedEvaluation = Callable[[Denoiser, torch.Tensor, torch.Tensor, ConditionLike], tuple[torch.Tensor, torch.Tensor]]


class ShiftAtStepEnd:
    """One step of a denoiser that answers as before, while x is shifted at the end of the step.

    `evaluate` is called once, at the first evaluation of the step, and returns the shift with D.
    """

    def __init__(self, denoiser: Denoiser, evaluate: ShiftedEvaluation):
        self._denoiser, self._evaluate = denoiser, evaluate
        self._shift: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
        if self._shift is not None:
            return self._denoiser(x, sigma, condition)
        D, self._shift = self._evaluate(self._denoiser, x, sigma, condition)
        return D

    def after_step(self, x: torch.Tensor, i: int, sigmas: torch.Tensor) -> torch.Tensor:
        x = after_step(self._denoiser, x, i, sigmas)
        return x if self._shift is None else x + self._shift.to(x.dtype)


def refuse_call() -> torch.Tensor:
    """Raise ValueError: a method that moves x acts on whole steps."""
    raise ValueError("this method moves x after each step: call for_step(i, sigmas) first, as the solvers do")


@dataclass(frozen=True)
class GradientStep(Wrapper):
    """`denoiser`, with x moved against the gradient of the loss after each step: x - scale * rule(start, sigma_next).

    The gradient is taken at the start of the step, once per step; the other evaluations cost what they did. `loss` and
    `backprop` as in `LossGuided`. At scale 0 guidance is off, bit for bit, and the loss is never called. Raises
    ValueError if it is called outside a sampling run.

    Example: `GradientStep(net, loss, DPSStep(step=1.0))`.
    """

    denoiser: Denoiser
    loss: Loss
    rule: StepRule
    scale: float = 1.0
    backprop: bool = True
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def idle_fields(self) -> frozenset[str]:
        return frozenset() if self.scale else frozenset({"loss"})

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
        return refuse_call()

    def scaled(self, share: float) -> "GradientStep":
        """The same with `share` of the strength: 0 is off, 1 as it is."""
        return replace(self, scale=self.scale * share)

    def for_step(self, i: int, sigmas: torch.Tensor) -> Denoiser:
        inner = for_step(self.denoiser, i, sigmas)
        if self.scale == 0:
            return inner
        loss = for_step(self.loss, i, sigmas)
        return ShiftAtStepEnd(inner, partial(self._evaluate, loss, sigmas[i + 1]))

    def _evaluate(
        self,
        loss: Loss,
        sigma_next: torch.Tensor,
        denoiser: Denoiser,
        x: torch.Tensor,
        sigma: torch.Tensor,
        condition: ConditionLike,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.backprop:
            found = slope(denoiser, loss, x, sigma, condition)
        else:
            found = slope_without_backprop(denoiser, loss, x, sigma, condition, self.sigma_data)
        return found.D, -self.scale * self.rule(StepStart(x, column(sigma, x), *found), sigma_next)
