"""Naive truncation: the score multiplied by the weight, so that samples gather where the density is highest."""

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser
from edm2kit.guidance.base import Method, Parts
from edm2kit.guidance.combine import Guided


def unchanged(x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
    """The denoiser whose score is zero: x itself."""
    return x


def truncated(denoiser: Denoiser, weight: float) -> Guided:
    """`denoiser` with its score multiplied by `weight`: x + weight * (D - x).

    Being led away from x itself, it costs no second network; 1.4 is the value of the comparison in Karras et al. 2024
    ("Guiding a Diffusion Model with a Bad Version of Itself", Fig. 1d).
    """
    return Guided(denoiser, unchanged, weight)


def _negative(parts: Parts) -> Denoiser:
    return unchanged


METHOD = Method(
    "naive truncation: multiply the score by the weight",
    "1 main",
    negative=_negative,
    weight=1.4,
    term="x",
    source="Karras et al. 2024 (autoguidance, arXiv 2406.02507), Fig. 1d",
    pick_when="you need a free baseline that trades variety for typical images; works with any denoiser",
)
