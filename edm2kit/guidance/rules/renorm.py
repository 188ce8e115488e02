"""Renormalised guidance (EP-CFG, CFG-Renorm): the linear rule's direction with the norm of the unguided D."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edm2kit.guidance.base import Option, Rule
from edm2kit.guidance.combine import Evaluation, linear
from edm2kit.guidance.option_types import one_of
from edm2kit.guidance.rules.coordinates import length, ratio, shortened_velocity


@dataclass(frozen=True)
class Renorm:
    """The linear rule's result, scaled to the norm of D, per image over all values.

    With `when` "larger" only results longer than D are scaled. `of` says what is scaled: "denoised" images (EP-CFG,
    without its robust estimate of the energy) or "velocity", n - y of a rectified flow (CFG-Renorm). These differ,
    since the velocity depends on x.
    """

    when: str = "always"
    of: str = "denoised"

    def __call__(
        self, D: torch.Tensor, negatives: Sequence[torch.Tensor], weights: Sequence[float], at: Evaluation
    ) -> torch.Tensor:
        guided = linear(D, negatives, weights, at)
        if self.of == "denoised":
            return self.scale(D, guided) * guided
        v = shortened_velocity(guided, at)
        # x / (1 + sigma) - scale v, written so that scale 1 changes nothing
        return guided + (1 - self.scale(shortened_velocity(D, at), v)) * v

    def scale(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        factor = ratio(length(before), length(after), otherwise=1.0)
        return factor.clamp(max=1) if self.when == "larger" else factor


def _make(*, renorm_when: str, renorm_of: str) -> Renorm:
    return Renorm(renorm_when, renorm_of)


RULE = Rule(
    "renormalised guidance (EP-CFG, CFG-Renorm): the linear rule with the norm of the unguided D",
    _make,
    options=(
        Option(
            "renorm-when",
            one_of("always", "larger"),
            "always",
            "Which results are scaled: always (EP-CFG) or larger (only those longer than D)",
        ),
        Option(
            "renorm-of",
            one_of("denoised", "velocity"),
            "denoised",
            "What is scaled: denoised (EP-CFG) or velocity (CFG-Renorm, of a rectified flow)",
        ),
    ),
    formula="G |D|/|G|, G the linear rule's result",
    source="Zhang et al. 2024 (EP-CFG, arXiv 2412.09966); Lumina-Image 2.0 2025 (CFG-Renorm, arXiv 2503.21758)",
    pick_when="large weights give too much contrast, and nothing should need to be tuned",
)
