"""Condition annealing (CADS): noise in the condition during the first steps, so that images vary more."""

import math
from dataclasses import dataclass, field, replace

import torch

from edm2kit.conditions import ClassLabels, ConditionLike, FloatVectors, condition_tensor
from edm2kit.denoiser import Denoiser, Wrapper
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.option_types import number
from edm2kit.guidance.step_generators import StepGenerators


@dataclass(frozen=True)
class AnnealedCondition(Wrapper):
    """`net` with the condition sqrt(g) y + noise sqrt(1 - g) n, n ~ N(0, I/K) per image and step, rescaled to y.

    g is 1 at times up to `start`, where nothing changes, and falls linearly to 0 at `end`. Time runs from 1 at the
    first step of a run to 0. y has K values; the authors add noise to the embedding of the label, and the embedding of
    n, a linear map in EDM2, is such noise with the variance of the embedding of y. Rescaled, the result has the mean
    and the standard deviation of y, over the values of each image's condition; `rescale` is the share of that. Raises
    ValueError if the images have no condition, or one of a single value, which has no spread to restore.
    """

    net: Denoiser
    noise: float
    start: float
    end: float
    rescale: float
    random: StepGenerators = field(default_factory=StepGenerators)
    time: float = 0.0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
        if condition is None:
            raise ValueError("condition annealing (cads) adds noise to the condition, and the images have none")
        if self.kept == 1:
            return self.net(x, sigma, condition)
        return self.net(x, sigma, self.anneal(condition))

    @property
    def kept(self) -> float:
        """g, the share of the condition that is kept at this time."""
        if self.time <= self.start:
            return 1.0
        return max((self.end - self.time) / (self.end - self.start), 0.0)

    def anneal(self, condition: ConditionLike) -> ConditionLike:
        """The condition with noise in it, of the same kind."""
        given = condition_tensor(condition)
        assert given is not None
        # one-hot labels have RMS 1/sqrt(K), which networks scale to 1; there the noise has the RMS `noise`
        n = self.random.generators().randn(given.shape).to(given) / math.sqrt(given.shape[1])
        noisy = math.sqrt(self.kept) * given + self.noise * math.sqrt(1 - self.kept) * n
        values = noisy
        if self.rescale > 0:
            _check_spread(given.shape[1])
            std, mean = torch.std_mean(given, dim=1, keepdim=True)
            noisy_std, noisy_mean = torch.std_mean(noisy, dim=1, keepdim=True)
            matched = (noisy - noisy_mean) / noisy_std.clamp_min(torch.finfo(noisy.dtype).tiny) * std + mean
            values = self.rescale * matched + (1 - self.rescale) * noisy
        if isinstance(condition, ClassLabels):
            return ClassLabels(values)
        if isinstance(condition, FloatVectors):
            return FloatVectors(values, condition.pool)
        return values

    def for_step(self, i: int, sigmas: torch.Tensor) -> "AnnealedCondition":
        return replace(super().for_step(i, sigmas), time=1 - i / (len(sigmas) - 1))


def _check_spread(num_values: int) -> None:
    """Raise ValueError for conditions of a single value: their standard deviation is not defined."""
    if num_values == 1:
        raise ValueError(
            "condition annealing restores the mean and spread of the condition, and this one is a single number, "
            "without a spread. Use --cads-rescale 0"
        )


def _build(
    parts: Parts, weight: float, *, cads_noise: float, cads_start: float, cads_end: float, cads_rescale: float
) -> Denoiser:
    if getattr(parts.net, "label_dim", None) == 0:
        raise ValueError("condition annealing needs a conditional network, and this one has no classes")
    if getattr(parts.net, "takes_text", False):
        raise ValueError(
            "condition annealing adds noise to labels or vectors, and this network takes text. Choose another method"
        )
    if cads_rescale > 0:
        _check_spread(getattr(parts.net, "label_dim", 0))
    if cads_start >= cads_end:
        raise ValueError(f"--cads-start is {cads_start:g} and --cads-end {cads_end:g}; the start must be below the end")
    if weight < 1:
        raise ValueError(f"condition annealing multiplies its noise by w - 1, and w is {weight:g}; use at least 1")
    if weight == 1:
        return parts.net
    return AnnealedCondition(parts.net, cads_noise * (weight - 1), cads_start, cads_end, cads_rescale)


METHOD = Method(
    "condition annealing (CADS): noise in the condition during the first steps",
    "1 main",
    build=_build,
    around=True,
    weight=2.0,
    options=(
        Option("cads-noise", number(0), 0.25, "Standard deviation of the noise at w = 2; it is multiplied by w - 1"),
        Option("cads-start", number(0, 1), 0.6, "Time, from 1 (first step) to 0, up to which nothing changes"),
        Option("cads-end", number(0, 1), 0.9, "Time from which on the condition is noise alone; above the start"),
        Option("cads-rescale", number(0, 1), 1.0, "Share of the correction of the noisy condition's mean and spread"),
    ),
    formula="D(x; sigma, y'), y' = sqrt(g) y + noise (w - 1) sqrt(1 - g) n, rescaled to the mean and spread of y",
    source="Sadat et al. 2023 (arXiv 2310.17347); tested on DiT",
    pick_when="guided images of a class look too much alike; around other methods, such as cfg with a large weight",
)
