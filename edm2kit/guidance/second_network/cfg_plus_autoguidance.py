"""Classifier-free guidance and autoguidance, mixed."""

from dataclasses import dataclass

import torch

from edm2kit.denoiser import Denoiser, after_step, for_images, for_step
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.option_types import number
from edm2kit.guidance.second_network.cfg import unconditional
from edm2kit.torch_utils.rng import StackedGenerator


@dataclass(frozen=True)
class Mixed:
    """(1 - share) * D_uncond + share * D_weak: at share 0 the weaker network is never called, at 1 the other.

    Led away from this is led away from both, with weights (1 - share)(w - 1) + 1 and share (w - 1) + 1. Karras et
    al. 2024 (autoguidance), App. B.2.
    """

    uncond: Denoiser
    weak: Denoiser
    share: float

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        if self.share == 1:
            return self.weak(x, sigma, labels)
        D_uncond = self.uncond(x, sigma, labels)
        return D_uncond if self.share == 0 else D_uncond.lerp(self.weak(x, sigma, labels), self.share)

    def for_images(self, rng: StackedGenerator) -> "Mixed":
        return Mixed(for_images(self.uncond, rng), for_images(self.weak, rng), self.share)

    def for_step(self, i: int, sigmas: torch.Tensor) -> "Mixed":
        return Mixed(for_step(self.uncond, i, sigmas), for_step(self.weak, i, sigmas), self.share)

    def after_step(self, x: torch.Tensor, i: int, sigmas: torch.Tensor) -> torch.Tensor:
        return after_step(self.weak, after_step(self.uncond, x, i, sigmas), i, sigmas)


def _negative(parts: Parts, *, mixed_share: float) -> Denoiser:
    assert parts.gnet is not None
    uncond = unconditional(parts.net) if parts.uncond is None else parts.uncond
    return Mixed(uncond, parts.gnet, mixed_share)


METHOD = Method(
    "classifier-free guidance and autoguidance mixed; without --uncond the main network itself drops its labels",
    "2 main + 1 guide, or 1 main + 1 guide + 1 unconditional",
    negative=_negative,
    needs_gnet=True,
    takes_uncond=True,
    options=(
        Option("mixed-share", number(0, 1), 0.5, "share of autoguidance: 0 is classifier-free guidance alone, 1 none"),
    ),
    term="(1 - a) D_uncond(x; sigma) + a D_guide(x; sigma, c)",
    source="Karras et al. 2024 (autoguidance, arXiv 2406.02507), App. B.2",
)
