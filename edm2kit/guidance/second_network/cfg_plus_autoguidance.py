"""Classifier-free guidance and autoguidance combined: away from a mean of both negatives."""

from dataclasses import dataclass

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser, Wrapper
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.option_types import number
from edm2kit.guidance.second_network.cfg import unconditional


@dataclass(frozen=True)
class Interpolation(Wrapper):
    """(1 - share) * D_uncond + share * D_weak. At share 0 the weaker network is never called, at 1 the other.

    Leading away from this is leading away from both, with weights (1 - share)(w - 1) + 1 and share (w - 1) + 1. Karras
    et al. 2024 (autoguidance), App. B.2.
    """

    uncond: Denoiser
    weak: Denoiser
    share: float

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
        if self.share == 1:
            return self.weak(x, sigma, condition)
        D_uncond = self.uncond(x, sigma, condition)
        if self.share == 0:
            return D_uncond
        return D_uncond.lerp(self.weak(x, sigma, condition), self.share)


def _negative(parts: Parts, *, cfg_plus_autoguidance_share: float) -> Denoiser:
    uncond = unconditional(parts.net) if parts.uncond is None else parts.uncond
    assert parts.gnet is not None  # `guide` has checked that there is one
    return Interpolation(uncond, parts.gnet, cfg_plus_autoguidance_share)


METHOD = Method(
    "classifier-free guidance and autoguidance combined; without --uncond the main network drops its condition",
    "2 main + 1 guide, or 1 main + 1 guide + 1 unconditional",
    negative=_negative,
    needs_gnet=True,
    takes_uncond=True,
    drops_condition=lambda parts: parts.uncond is None,
    options=(
        Option(
            "cfg-plus-autoguidance-share",
            number(0, 1),
            0.5,
            "Share of autoguidance: 0 is classifier-free guidance only, 1 autoguidance only",
        ),
    ),
    term="(1 - a) D_uncond(x; sigma) + a D_guide(x; sigma, c)",
    source="Karras et al. 2024 (autoguidance, arXiv 2406.02507), App. B.2",
    pick_when="autoguidance alone leaves images that do not match their condition well enough",
)
