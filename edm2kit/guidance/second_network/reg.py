"""Rectified gradient guidance (REG): the difference weighted by how much the image reacts to each pixel of x."""

from dataclasses import dataclass, replace

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser, Wrapper
from edm2kit.guidance.base import Method, Parts
from edm2kit.guidance.combine import Guided
from edm2kit.guidance.second_network.cfg import unconditional


def reaction(
    denoiser: Denoiser, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike
) -> tuple[torch.Tensor, torch.Tensor]:
    """D, and the gradient by x of the sum of all values of D: both [N, C, H, W].

    One evaluation and one backward pass. Images do not affect each other, so all gradients come from one sum.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        D = denoiser(leaf, sigma, condition)
        if not D.requires_grad:  # it does not depend on x
            return D, torch.zeros_like(leaf)
        gradient = torch.autograd.grad(D.sum(), leaf, materialize_grads=True)[0]
    return D.detach(), gradient


@dataclass(frozen=True)
class RectifiedGradient(Wrapper):
    """The denoiser D + (w - 1) g (D - D_neg), g the gradient by x of the sum of D, value by value.

    The exact posterior of a guided diffusion needs the gradient of an expectation over the future; g is the authors'
    approximation of it from the present step. Both denoisers see the same x. At weight 1 it is off: `neg` is never
    called, nothing is differentiated, and the result is that of `pos`, bit for bit. Raises ValueError if the weight is
    not finite. Gao et al. 2025 (arXiv 2501.18865); tested on EDM2.

    Example: `RectifiedGradient(net, weaker_net, 2.0)`.
    """

    pos: Denoiser
    neg: Denoiser
    weight: float

    def __post_init__(self) -> None:
        Guided(self.pos, self.neg, self.weight)  # checks the weight

    def idle_fields(self) -> frozenset[str]:
        return frozenset({"neg"}) if self.weight == 1 else frozenset()

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
        if self.weight == 1:
            return self.pos(x, sigma, condition)
        D, gradient = reaction(self.pos, x, sigma, condition)
        D_neg = self.neg(x, sigma, condition)
        return D + (self.weight - 1) * gradient * (D - D_neg)

    def scaled(self, share: float) -> "RectifiedGradient":
        """The same with `share` of the strength: 0 is off, 1 as it is."""
        return replace(self, weight=1 + (self.weight - 1) * share)


def _build(parts: Parts, weight: float) -> Denoiser:
    negative = unconditional(parts.net) if parts.gnet is None else parts.gnet
    return RectifiedGradient(parts.net, negative, weight)


METHOD = Method(
    "rectified gradient guidance (REG): the difference weighted by how D reacts to x",
    "2 main, or 1 main + 1 guide, and a backward pass through main",
    build=_build,
    takes_gnet=True,
    drops_condition=lambda parts: parts.gnet is None,
    formula="D + (w - 1) g (D - D_neg), g = gradient by x of the sum of D",
    term="D_guide(x; sigma, c), or D(x; sigma, 0)",
    source="Gao et al. 2025 (arXiv 2501.18865); tested on EDM2",
    pick_when="you have time for a backward pass, and want to improve on cfg or autoguidance at the same weight",
)
