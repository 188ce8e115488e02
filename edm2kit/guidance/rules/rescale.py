"""Guidance that keeps the contrast of the unguided answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edm2kit.guidance.base import Option, Rule
from edm2kit.guidance.combine import linear
from edm2kit.guidance.option_types import number


@dataclass(frozen=True)
class Rescaled:
    """The linear rule's answer, brought by `share` towards the standard deviation of D, per image over all pixels."""

    share: float

    def __call__(self, D: torch.Tensor, negatives: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        guided = linear(D, negatives, weights)
        if self.share == 0:
            return guided
        before, after = (part.flatten(1).std(dim=1).reshape(-1, *[1] * (D.ndim - 1)) for part in (D, guided))
        ratio = torch.where(after > 0, before / after, 1.0)
        return guided * (self.share * ratio + (1 - self.share))


def _make(*, rescale_share: float) -> Rescaled:
    return Rescaled(rescale_share)


RULE = Rule(
    "the linear rule with the contrast of the unguided answer",
    _make,
    options=(Option("rescale-share", number(0, 1), 0.7, "0 is the linear rule, 1 exactly D's standard deviation"),),
    formula="s G std(D)/std(G) + (1 - s) G, G the linear rule's answer",
    source="Lin et al. 2023 (arXiv 2305.08891)",
)
