"""Towards what a loss asks for: the gradient of a loss of the denoised image, as part of the score."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from edm2kit.denoiser import Denoiser, after_step, for_images, for_step
from edm2kit.guidance.losses.targets import Loss
from edm2kit.torch_utils.rng import StackedGenerator


def column(sigma: torch.Tensor | float, x: torch.Tensor) -> torch.Tensor:
    """`sigma`, a scalar or one per image, in a shape that broadcasts against `x`, with its dtype and device."""
    return torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))


def c_out(sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """How far clean images lie from the denoised one, exactly so for Gaussian data: sigma sigma_d / sqrt(...)."""
    return sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()


class Slope(NamedTuple):
    """The denoised images D, their losses [N], and the gradient of each image's loss by x or by D."""

    D: torch.Tensor
    loss: torch.Tensor
    gradient: torch.Tensor


def slope_at(loss: Loss, D: torch.Tensor) -> Slope:
    """The loss of `D` and its gradient by `D` itself: no denoiser is run backwards."""
    with torch.enable_grad():
        leaf = D.detach().requires_grad_()
        losses = _losses(loss, leaf)
        return Slope(D, losses.detach(), _gradient(losses, leaf))


def slope(
    denoiser: Denoiser,
    loss: Loss,
    x: torch.Tensor,
    sigma: torch.Tensor,
    labels: torch.Tensor | None,
    backprop: bool = True,
    sigma_data: float = 0.5,
) -> Slope:
    """The loss of D(x) and its gradient by x, at one call of the denoiser.

    `loss` may differ between noise levels (`loss.at(sigma)`). Without `backprop` the denoiser is not run backwards:
    its slope is taken to be that of Gaussian data, sigma_d^2 / (sigma^2 + sigma_d^2).
    """
    loss = loss_at(loss, sigma)
    if not backprop:
        found = slope_at(loss, denoiser(x, sigma, labels))
        share = sigma_data**2 / (column(sigma, x) ** 2 + sigma_data**2)
        return found._replace(gradient=share * found.gradient)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        D = denoiser(leaf, sigma, labels)
        found = slope_at(loss, D.detach())
        if not D.requires_grad:
            return found._replace(gradient=torch.zeros_like(leaf))
        # brought to the size of 1 on the way back: half precision inside the network knows neither 1e-8 nor 1e5
        size = found.gradient.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(D.dtype).tiny)
        back = torch.autograd.grad(D, leaf, found.gradient / size, materialize_grads=True)[0]
        return found._replace(gradient=back * size)


def _losses(loss: Loss, D: torch.Tensor) -> torch.Tensor:
    losses = loss(D)
    if losses.shape != D.shape[:1]:
        raise ValueError(f"the loss of {len(D)} images has shape {list(losses.shape)}; expected one number per image")
    return losses


def _gradient(losses: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    if not losses.requires_grad:
        return torch.zeros_like(leaf)
    # images do not touch each other, so the gradient of the sum holds the gradient of each
    return torch.autograd.grad(losses.sum(), leaf, materialize_grads=True)[0]


def loss_at(loss: Loss, sigma: torch.Tensor) -> Loss:
    """`loss.at(sigma)`, for losses that differ between noise levels, or the loss itself."""
    at = getattr(loss, "at", None)
    return loss if at is None else at(sigma)


def check_scale(scale: float) -> None:
    """Raise ValueError on a scale that is not finite."""
    if not math.isfinite(scale):
        raise ValueError(f"the scale of loss guidance is {scale}; expected a finite number (0 is off)")


@dataclass(frozen=True)
class LossGuided:
    """The denoiser D - scale * sigma^2 * (gradient of loss(D(x)) by x): the score of p(x) exp(-scale loss).

    Chung et al. 2023 (DPS, arXiv 2209.14687) and Yu et al. 2023 (FreeDoM, arXiv 2303.09833), in score form. The
    gradient runs through the denoiser, about three times the cost of a plain call. Without `backprop` it stops at the
    denoised image, and the slope of the denoiser is taken to be that of Gaussian data, which leaves
    D - scale * c_out^2 * (gradient by D): as He et al. 2024 (MPGD, arXiv 2311.16424), at the cost of a plain call.

    `loss`: denoised images -> [N]; it may follow the run by `for_images` and `for_step` as denoisers do, and the noise
    level by `at(sigma) -> loss`. At scale 0 guidance is off, bit for bit, and the loss is never called. Raises
    ValueError on a scale that is not finite, and where the loss is not one number per image.
    """

    denoiser: Denoiser
    loss: Loss
    scale: float
    backprop: bool = True
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        if self.scale == 0:
            return self.denoiser(x, sigma, labels)
        found = slope(self.denoiser, self.loss, x, sigma, labels, self.backprop, self.sigma_data)
        return found.D - self.scale * column(sigma, x) ** 2 * found.gradient

    def scaled(self, share: float) -> "LossGuided":
        """The same, guided by `share` of the strength: 0 is off, 1 as it is."""
        return replace(self, scale=self.scale * share)

    def for_images(self, rng: StackedGenerator) -> "LossGuided":
        loss = for_images(self.loss, rng) if self.scale else self.loss
        return replace(self, denoiser=for_images(self.denoiser, rng), loss=loss)

    def for_step(self, i: int, sigmas: torch.Tensor) -> "LossGuided":
        loss = for_step(self.loss, i, sigmas) if self.scale else self.loss
        return replace(self, denoiser=for_step(self.denoiser, i, sigmas), loss=loss)

    def after_step(self, x: torch.Tensor, i: int, sigmas: torch.Tensor) -> torch.Tensor:
        return after_step(self.denoiser, x, i, sigmas)
