"""PMC-CFG: the linear rule, shortened so that the norm of D grows by a given factor at most."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edm2kit.guidance.base import Option, Rule
from edm2kit.guidance.combine import Evaluation
from edm2kit.guidance.option_types import number
from edm2kit.guidance.rules.coordinates import inner, ratio


@dataclass(frozen=True)
class PowerLimit:
    """D + b d, d = sum of (w - 1) (D - D_neg), b the largest share up to 1 with |D + b d| <= `gain` |D|, per image.

    With one negative b (w - 1) is the authors' min(w - 1, root of their quadratic equation); they have weights above 1
    only. The sum of several differences is limited as a whole.
    """

    gain: float

    def __call__(
        self, D: torch.Tensor, negatives: Sequence[torch.Tensor], weights: Sequence[float], at: Evaluation
    ) -> torch.Tensor:
        change = torch.zeros_like(D)
        for weight, negative in zip(weights, negatives, strict=True):
            change = change + (weight - 1) * (D - negative)
        # |D + b change|^2 = gain^2 |D|^2 is a b^2 + 2 h b - room = 0
        a, h = inner(change, change), inner(D, change)
        room = (self.gain**2 - 1) * inner(D, D)
        root = (h.square() + a * room).sqrt()
        # two forms of the same root, each where it does not subtract numbers of equal size
        share = torch.where(h > 0, ratio(room, h + root, 1.0), ratio(root - h, a, 1.0))
        return D + share.clamp(max=1) * change


def _make(*, pmc_gain: float) -> PowerLimit:
    return PowerLimit(pmc_gain)


RULE = Rule(
    "PMC-CFG: the linear rule, up to a given growth of the norm of D",
    _make,
    options=(Option("pmc-gain", number(1, 1e6), 1.05, "Largest norm of the guided D, as a multiple of that of D"),),
    formula="D + b d, d = sum of (w_i - 1) (D - D_neg_i), b <= 1 the largest with |D + b d| <= gain |D|",
    source="arXiv 2609.24287 (PMC-CFG)",
    pick_when="large weights saturate images, and small ones should stay exactly what they are",
)
