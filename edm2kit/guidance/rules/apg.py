"""Adaptive projected guidance (APG): reduces the part of the difference that only lengthens D."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from edm2kit.guidance.base import Option, Rule
from edm2kit.guidance.combine import Evaluation
from edm2kit.guidance.option_types import number
from edm2kit.torch_utils.rng import StackedGenerator


class DifferenceMemory:
    """The last differences D - D_neg of one sampling run: read when a step begins, written once in it."""

    def __init__(self) -> None:
        self._step = -1
        self._latest: tuple[torch.Tensor, ...] = ()
        self._written = False

    def begin(self, i: int) -> tuple[torch.Tensor, ...]:
        """The differences of the last guided step before step i; none at the start of a run."""
        if i <= self._step:  # time went back: another run
            self._latest = ()
        self._step, self._written = i, False
        return self._latest

    def keep(self, differences: Sequence[torch.Tensor]) -> None:
        """Store these for the next step. Only the first call of a step counts; its corrector is ignored."""
        if not self._written:
            self._latest, self._written = tuple(differences), True


@dataclass(frozen=True)
class AdaptiveProjection:
    """D + sum of (w - 1) (across + parallel * along), `along` being the part of D - D_neg along D.

    Before that, `momentum` times the difference of the previous step is added to D - D_neg, and differences longer
    than `norm` are shortened to it; both per image, over all its pixels. parallel 1, norm inf and momentum 0 are the
    linear rule. The previous step is forgotten when a run starts (`for_images`, or an earlier step).
    """

    parallel: float
    norm: float
    momentum: float
    memory: DifferenceMemory = field(default_factory=DifferenceMemory)
    before: tuple[torch.Tensor, ...] = ()

    def __call__(
        self, D: torch.Tensor, negatives: Sequence[torch.Tensor], weights: Sequence[float], at: Evaluation
    ) -> torch.Tensor:
        differences = [D - negative for negative in negatives]
        if self.before and self.momentum:
            pairs = zip(differences, self.before, strict=True)
            differences = [difference + self.momentum * before.to(difference) for difference, before in pairs]
        self.memory.keep(differences)
        terms = []
        for weight, difference in zip(weights, differences, strict=True):
            terms.append((weight - 1) * self.project(difference, D))
        return D + sum(terms)

    def project(self, difference: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
        """`difference`, shortened to `norm` if it is longer, with `parallel` of its part along D."""
        pixels = tuple(range(1, D.ndim))
        length = torch.linalg.vector_norm(difference, dim=pixels, keepdim=True)
        difference = torch.where(length > self.norm, difference * (self.norm / length), difference)
        unit = torch.nn.functional.normalize(D.flatten(1), dim=1).reshape(D.shape)
        along = (difference * unit).sum(dim=pixels, keepdim=True) * unit
        return difference - along + self.parallel * along

    def for_images(self, rng: StackedGenerator) -> "AdaptiveProjection":
        return replace(self, memory=DifferenceMemory())

    def for_step(self, i: int, sigmas: torch.Tensor) -> "AdaptiveProjection":
        return replace(self, before=self.memory.begin(i))


def _make(*, apg_parallel: float, apg_norm: float, apg_momentum: float) -> AdaptiveProjection:
    return AdaptiveProjection(apg_parallel, apg_norm, apg_momentum)


RULE = Rule(
    "adaptive projected guidance (APG): reduces the part of the difference along D",
    _make,
    options=(  # as published for SDXL
        Option("apg-parallel", number(), 0.0, "Share of the part along D that is kept: 0 none, 1 all"),
        Option("apg-norm", number(0), 15.0, "Largest norm of a difference, over all pixels of an image; inf: no limit"),
        Option("apg-momentum", number(), -0.5, "Share of the previous step's difference that is added; 0: none"),
    ),
    formula="D + sum of (w_i - 1) (d_i - (1 - parallel) d_i along D), d_i = D - D_neg_i",
    source="Sadat et al. 2024 (arXiv 2410.02416)",
    pick_when="large weights give oversaturated images and you want to keep their sharpness",
)
