"""Adaptive projected guidance: the part of the difference that only lengthens the answer is held back."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from edm2kit.guidance.base import Option, Rule
from edm2kit.guidance.option_types import number
from edm2kit.torch_utils.rng import StackedGenerator


class Momentum:
    """The last differences of one sampling run: read when a step begins, written once in it."""

    def __init__(self) -> None:
        self._step, self._latest, self._written = -1, (), False

    def begin(self, i: int) -> tuple[torch.Tensor, ...]:
        """The differences that the last guided step left, none at the start of a run."""
        if i <= self._step:  # time went back: another run
            self._latest = ()
        self._step, self._written = i, False
        return self._latest

    def keep(self, differences: Sequence[torch.Tensor]) -> None:
        """Leave these to the next step; what a step keeps after the first time (its corrector) is ignored."""
        if not self._written:
            self._latest, self._written = tuple(differences), True


@dataclass(frozen=True)
class Projected:
    """D + sum of (w - 1) (across + parallel * along), `along` being the part of D - D_neg along D.

    Before, `momentum` times the difference of the step before joins D - D_neg, and what is longer than `norm` is
    shortened to it; both per image, over all its pixels. parallel 1, norm inf and momentum 0 are the linear rule.
    What a run has left behind is forgotten when the next begins (`for_images`, or an earlier step).
    """

    parallel: float
    norm: float
    momentum: float
    memory: Momentum = field(default_factory=Momentum)
    before: tuple[torch.Tensor, ...] = ()

    def __call__(self, D: torch.Tensor, negatives: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        differences = [D - negative for negative in negatives]
        if self.before and self.momentum:
            differences = [d + self.momentum * b.to(d) for d, b in zip(differences, self.before, strict=True)]
        self.memory.keep(differences)
        return D + sum((w - 1) * self._project(d, D) for w, d in zip(weights, differences, strict=True))

    def _project(self, difference: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
        pixels = tuple(range(1, D.ndim))
        length = torch.linalg.vector_norm(difference, dim=pixels, keepdim=True)
        difference = torch.where(length > self.norm, difference * (self.norm / length), difference)
        unit = torch.nn.functional.normalize(D.flatten(1), dim=1).reshape(D.shape)
        along = (difference * unit).sum(dim=pixels, keepdim=True) * unit
        return difference - along + self.parallel * along

    def for_images(self, rng: StackedGenerator) -> "Projected":
        return replace(self, memory=Momentum())

    def for_step(self, i: int, sigmas: torch.Tensor) -> "Projected":
        return replace(self, before=self.memory.begin(i))


def _make(*, apg_parallel: float, apg_norm: float, apg_momentum: float) -> Projected:
    return Projected(apg_parallel, apg_norm, apg_momentum)


RULE = Rule(
    "adaptive projected guidance: lengthening the answer is held back",
    _make,
    options=(  # as published for SDXL
        Option("apg-parallel", number(), 0.0, "how much of the part along D is kept; 1 is all"),
        Option("apg-norm", number(0), 15.0, "longest difference, over all pixels of an image; inf is no limit"),
        Option("apg-momentum", number(), -0.5, "share of the previous step's difference that is added; 0 is none"),
    ),
    formula="D + sum of (w_i - 1) (d_i - (1 - parallel) d_i along D), d_i = D - D_neg_i",
    source="Sadat et al. 2024 (arXiv 2410.02416)",
)
