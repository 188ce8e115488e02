"""Angle-domain guidance (ADG): D is turned away from the negative, by a limited angle."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edm2kit.guidance.base import Option, Rule
from edm2kit.guidance.combine import Evaluation
from edm2kit.guidance.option_types import number
from edm2kit.guidance.rules.coordinates import inner, length, ratio


@dataclass(frozen=True)
class AngleDomain:
    """cos f D + (sin f / sin a) (D - its projection on D_neg), a the angle between both, f = (w - 1) a.

    f is limited to `max_angle` degrees in either direction. Angles are per image, over all values, and belong to
    denoised images, as the authors' do. The second term is as long as D times sin f but at a right angle to D_neg, not
    to D: it is not a rotation, and makes D longer by the square root of 1 + sin(2 f) sin a, up to 1.41 times. The
    changes by several negatives add up.
    """

    max_angle: float

    def __call__(
        self, D: torch.Tensor, negatives: Sequence[torch.Tensor], weights: Sequence[float], at: Evaluation
    ) -> torch.Tensor:
        limit = math.radians(self.max_angle)
        guided = D
        for weight, negative in zip(weights, negatives, strict=True):
            unit = ratio(negative, length(negative), otherwise=0.0)
            along = inner(D, unit)
            across = torch.where(length(negative) > 0, D - along * unit, 0)  # zero has no direction to turn from
            angle = torch.atan2(length(across), along)  # exact for small angles, unlike the arc cosine
            turn = ((weight - 1) * angle).clamp(-limit, limit)
            factor = ratio(turn.sin(), angle.sin(), otherwise=0.0)
            guided = guided + (turn.cos() - 1) * D + factor * across
        return guided


def _make(*, adg_max_angle: float) -> AngleDomain:
    return AngleDomain(adg_max_angle)


RULE = Rule(
    "angle-domain guidance (ADG): turn D away from the negative, by a limited angle",
    _make,
    options=(Option("adg-max-angle", number(0, 180), 60.0, "Largest angle by which D is turned, in degrees"),),
    formula="cos f D + (sin f/sin a) (D - D along D_neg), a the angle of both, f = min((w - 1) a, max)",
    source="Jin et al. 2025 (arXiv 2506.11039); tested on SD3",
    pick_when="large weights give oversaturated images, and you want a limit that holds for any weight",
)
