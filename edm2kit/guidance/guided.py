"""One network led away from another: the formula that most guidance methods share."""

import math
from dataclasses import dataclass

import torch

from edm2kit.denoiser import Denoiser, after_step, for_images, for_step
from edm2kit.torch_utils.rng import StackedGenerator


@dataclass(frozen=True)
class Guided:
    """The denoiser D_neg + weight * (D_pos - D_neg), both at the same x, sigma and labels.

    With a weaker network as `neg` this is autoguidance (Karras et al. 2024, Eq. 3), with an unconditional one
    classifier-free guidance (Ho & Salimans 2022). At weight 1 guidance is off: `neg` is never called and the
    answer is that of `pos`, bit for bit. Weights below 1 interpolate, negative ones are legal. The two parts are
    combined in float32 or better, because weight - 1 amplifies rounding. Either part may itself be guided.
    Raises ValueError on a weight that is not finite.
    """

    pos: Denoiser
    neg: Denoiser
    weight: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"the guidance weight is {self.weight}; expected a finite number (1 is off)")

    @property
    def is_off(self) -> bool:
        return self.weight == 1

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        D_pos = self.pos(x, sigma, labels)
        if self.is_off:
            return D_pos
        D_neg = self.neg(x, sigma, labels)
        dtype = torch.promote_types(torch.promote_types(D_pos.dtype, D_neg.dtype), torch.float32)
        D_pos, D_neg = D_pos.to(dtype), D_neg.to(dtype)
        return D_neg + self.weight * (D_pos - D_neg)

    def scaled(self, share: float) -> "Guided":
        """The same, guided by `share` of the strength: 0 is off, 1 as it is."""
        return Guided(self.pos, self.neg, 1 + (self.weight - 1) * share)

    def for_images(self, rng: StackedGenerator) -> "Guided":
        neg = self.neg if self.is_off else for_images(self.neg, rng)
        return Guided(for_images(self.pos, rng), neg, self.weight)

    def for_step(self, i: int, sigmas: torch.Tensor) -> "Guided":
        neg = self.neg if self.is_off else for_step(self.neg, i, sigmas)
        return Guided(for_step(self.pos, i, sigmas), neg, self.weight)

    def after_step(self, x: torch.Tensor, i: int, sigmas: torch.Tensor) -> torch.Tensor:
        x = after_step(self.pos, x, i, sigmas)
        return x if self.is_off else after_step(self.neg, x, i, sigmas)
