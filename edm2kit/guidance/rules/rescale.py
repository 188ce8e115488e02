"""Rescaled guidance: the linear rule with the contrast of the unguided D."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edm2kit.guidance.base import Option, Rule
from edm2kit.guidance.combine import Evaluation, linear
from edm2kit.guidance.option_types import number


@dataclass(frozen=True)
class StdRescale:
    """The linear rule's result, moved by `share` towards the standard deviation of D, per image over all pixels."""

    share: float

    def __call__(
        self, D: torch.Tensor, negatives: Sequence[torch.Tensor], weights: Sequence[float], at: Evaluation
    ) -> torch.Tensor:
        guided = linear(D, negatives, weights, at)
        if self.share == 0:
            return guided
        before, after = (part.flatten(1).std(dim=1).reshape(-1, *[1] * (D.ndim - 1)) for part in (D, guided))
        ratio = torch.where(after > 0, before / after, 1.0)
        return guided * (self.share * ratio + (1 - self.share))


def _make(*, rescale_share: float) -> StdRescale:
    return StdRescale(rescale_share)


RULE = Rule(
    "the linear rule with the contrast of the unguided D",
    _make,
    options=(
        Option(
            "rescale-share",
            number(0, 1),
            0.7,
            "Share of the correction: 0 the linear rule, 1 the standard deviation of D",
        ),
    ),
    formula="s G std(D)/std(G) + (1 - s) G, G the linear rule's result",
    source="Lin et al. 2023 (arXiv 2305.08891)",
    pick_when="large weights give overexposed or oversaturated images",
)
