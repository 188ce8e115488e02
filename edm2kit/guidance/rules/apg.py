"""Adaptive projected guidance (APG): reduces the part of the difference that only lengthens D.

D and its negatives have the same x, and the paper computes in D, so there is nothing to convert. Momentum is updated at
every evaluation, as in the authors' code: twice in a Heun step, and the second update sees the first. Once a step is an
option, and leads to other images: pixels of the final sample differed by up to 0.7 where both were compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from edm2kit.guidance.base import Option, Rule
from edm2kit.guidance.combine import Evaluation
from edm2kit.guidance.history import Steps
from edm2kit.guidance.option_types import number, one_of
from edm2kit.torch_utils.rng import StackedGenerator


class Published(NamedTuple):
    """Settings of the paper for one network."""

    weight: float
    parallel: float
    norm: float
    momentum: float


PUBLISHED: Mapping[str, Published] = {
    "EDM2-S": Published(4.0, 0.0, 2.5, -0.75),
    "DiT-XL/2": Published(4.0, 0.0, 5.0, -0.5),
    "SD 2.1": Published(10.0, 0.0, 7.5, -0.75),
    "SDXL": Published(15.0, 0.0, 15.0, -0.5),
}
UPDATES = ("evaluation", "step")


class DifferenceMemory:
    """The last differences D - D_neg of one sampling run, momentum included."""

    def __init__(self) -> None:
        self._steps = Steps()
        self._written = False
        self.latest: tuple[torch.Tensor, ...] = ()

    def begin(self, i: int, sigmas: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The differences of the step before step i; none at the start of a run, or if noise was added in between."""
        if not self._steps.continues(i, sigmas):
            self.latest = ()
        self._written = False
        return self.latest

    def keep(self, differences: Sequence[torch.Tensor], once_a_step: bool) -> None:
        """Store these for later. With `once_a_step` only the first call of a step counts; its corrector is ignored."""
        if not (once_a_step and self._written):
            self.latest, self._written = tuple(differences), True


@dataclass(frozen=True)
class AdaptiveProjection:
    """D + sum of (w - 1) (across + parallel * along), `along` being the part of D - D_neg along D.

    Before that, `momentum` times the difference of the previous evaluation (or the previous step, if `update` is
    "step") is added to D - D_neg, and differences longer than `norm` are shortened to it; both per image, over all its
    pixels. parallel 1, norm inf and momentum 0 are the linear rule. What was before is forgotten when a run starts
    (`for_images`, or a step that does not begin where the last one ended), and momentum exists only inside a run.
    """

    parallel: float
    norm: float
    momentum: float
    update: str = "evaluation"
    memory: DifferenceMemory = field(default_factory=DifferenceMemory, repr=False)
    before: tuple[torch.Tensor, ...] = ()

    def __call__(
        self, D: torch.Tensor, negatives: Sequence[torch.Tensor], weights: Sequence[float], at: Evaluation
    ) -> torch.Tensor:
        differences = [D - negative for negative in negatives]
        if at.i is not None and self.momentum:
            before = self.memory.latest if self.update == "evaluation" else self.before
            if before:
                pairs = zip(differences, before, strict=True)
                differences = [difference + self.momentum * last.to(difference) for difference, last in pairs]
            self.memory.keep(differences, self.update == "step")
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
        return replace(self, before=self.memory.begin(i, sigmas))


def _make(*, apg_parallel: float, apg_norm: float, apg_momentum: float, apg_update: str) -> AdaptiveProjection:
    return AdaptiveProjection(apg_parallel, apg_norm, apg_momentum, apg_update)


_EDM2 = PUBLISHED["EDM2-S"]

RULE = Rule(
    "adaptive projected guidance (APG): reduces the part of the difference along D",
    _make,
    options=(
        Option("apg-parallel", number(), _EDM2.parallel, "Share of the part along D that is kept: 0 none, 1 all"),
        Option(
            "apg-norm",
            number(0),
            _EDM2.norm,
            "Largest norm of a difference, over all pixels of an image; inf: no limit. Published for EDM2-S: 2.5 with "
            "--guidance 4; DiT-XL/2: 5 with 4; SD 2.1: 7.5 with 10; SDXL: 15 with 15",
        ),
        Option(
            "apg-momentum",
            number(),
            _EDM2.momentum,
            "Share of the previous difference that is added; 0: none. Published for EDM2-S and SD 2.1: -0.75; DiT-XL/2 "
            "and SDXL: -0.5",
        ),
        Option(
            "apg-update",
            one_of(*UPDATES),
            "evaluation",
            "When the momentum is updated: at every evaluation (as published: twice in a Heun step), or once a step",
        ),
    ),
    formula="D + sum of (w_i - 1) (d_i - (1 - parallel) d_i along D), d_i = D - D_neg_i",
    source="Sadat et al. 2024 (arXiv 2410.02416)",
    pick_when="large weights give oversaturated images and you want to keep their sharpness",
)
