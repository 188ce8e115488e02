"""Power-law guidance: the further apart D and its negative are, the more than proportionally it is led away."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edm2kit.guidance.base import Option, Rule
from edm2kit.guidance.combine import Evaluation
from edm2kit.guidance.option_types import number
from edm2kit.guidance.rules.coordinates import length, noise_level


@dataclass(frozen=True)
class PowerLaw:
    """D + sum of (w - 1) |s|^power (D - D_neg), with s = (D - D_neg) / sigma^2, the difference of the scores.

    The norm is taken per image, over all values. Power 0 is the linear rule. The authors' strength omega is w - 1.
    Both scores are evaluated at the same x, and x cancels in their difference, so combining scores and combining
    denoised images is the same.
    """

    power: float

    def __call__(
        self, D: torch.Tensor, negatives: Sequence[torch.Tensor], weights: Sequence[float], at: Evaluation
    ) -> torch.Tensor:
        guided = D
        for weight, negative in zip(weights, negatives, strict=True):
            difference = D - negative
            scores_apart = length(difference) / noise_level(at, D) ** 2
            # without a difference there is nothing to scale, and 0 to a negative power is infinite
            factor = torch.where(scores_apart > 0, scores_apart**self.power, 0)
            guided = guided + (weight - 1) * factor * difference
        return guided


def _make(*, power_law_power: float) -> PowerLaw:
    return PowerLaw(power_law_power)


RULE = Rule(
    "power-law guidance: strong where D and its negative are far apart, weak where they agree",
    _make,
    options=(
        Option(
            "power-law-power",
            number(-0.99),
            0.9,
            "Exponent of the distance between the scores: 0 is the linear rule; weights need to be tuned again",
        ),
    ),
    formula="D + sum of (w_i - 1) |d_i / sigma^2|^power d_i, d_i = D - D_neg_i",
    source="Pavasovic et al. 2025 (arXiv 2502.07849); tested on EDM2-S at 512x512",
    pick_when="you can afford to tune the weight again, and want guidance to fade by itself where both networks agree",
)
