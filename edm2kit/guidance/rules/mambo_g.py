"""MAMBO-G: the weight falls where the difference is large compared with the negative itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edm2kit.guidance.base import Option, Rule
from edm2kit.guidance.combine import Evaluation
from edm2kit.guidance.option_types import number, one_of
from edm2kit.guidance.rules.coordinates import length, ratio, shortened_velocity


@dataclass(frozen=True)
class MagnitudeAware:
    """D + sum of (w - 1) exp(-damping |D - D_neg| / |D_neg|) (D - D_neg), norms per image over all values.

    `relative_to` says what the norm below the line belongs to: "denoised", D_neg; or "velocity", the negative velocity
    of a rectified flow, which is what networks that predict velocities compare with. The difference itself is the same
    in both up to a factor that cancels. If the norm is 0, nothing is guided.
    """

    damping: float
    relative_to: str = "denoised"

    def __call__(
        self, D: torch.Tensor, negatives: Sequence[torch.Tensor], weights: Sequence[float], at: Evaluation
    ) -> torch.Tensor:
        guided = D
        for weight, negative in zip(weights, negatives, strict=True):
            difference = D - negative
            prediction = negative if self.relative_to == "denoised" else shortened_velocity(negative, at)
            share = torch.exp(-self.damping * ratio(length(difference), length(prediction), otherwise=torch.inf))
            guided = guided + (weight - 1) * share * difference
        return guided


def _make(*, mambo_g_damping: float, mambo_g_relative_to: str) -> MagnitudeAware:
    return MagnitudeAware(mambo_g_damping, mambo_g_relative_to)


RULE = Rule(
    "MAMBO-G: less weight where the difference is large compared with the negative",
    _make,
    options=(
        Option(
            "mambo-g-damping", number(0, 1e6), 8.0, "How fast the weight falls with the relative difference; 0: linear"
        ),
        Option(
            "mambo-g-relative-to",
            one_of("denoised", "velocity"),
            "denoised",
            "What the difference is compared with: denoised (D_neg) or velocity (that of a rectified flow)",
        ),
    ),
    formula="D + sum of (w_i - 1) exp(-damping |d_i|/|D_neg_i|) d_i, d_i = D - D_neg_i",
    source="MAMBO-G 2025 (arXiv 2508.03442)",
    pick_when="large weights make the first steps overshoot, with a network of images or of videos",
)
