"""The gradient of a loss of the denoised image, by the image itself or through the denoiser."""

from typing import NamedTuple

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser
from edm2kit.guidance.losses.loss import Loss, loss_at


def column(sigma: torch.Tensor | float, x: torch.Tensor) -> torch.Tensor:
    """`sigma`, a scalar or one per image, in a shape that broadcasts against `x`, with its dtype and device."""
    return torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))


def c_out(sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """Standard deviation of clean images around D, exact for Gaussian data.

    sigma sigma_d / sqrt(sigma^2 + sigma_d^2): Karras et al. 2022, Table 1.
    """
    return sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()


class Slope(NamedTuple):
    """The denoised images D, their losses [N], and the gradient of each image's loss by x or by D."""

    D: torch.Tensor
    loss: torch.Tensor
    gradient: torch.Tensor


def slope_at(loss: Loss, D: torch.Tensor) -> Slope:
    """The loss of `D` and its gradient by `D` itself; no backward pass through a denoiser.

    Raises ValueError if the loss is not one number per image.
    """
    with torch.enable_grad():
        leaf = D.detach().requires_grad_()
        losses = loss(leaf)
        if losses.shape != D.shape[:1]:
            raise ValueError(f"the loss of {len(D)} images has shape {list(losses.shape)}; expected one per image")
        if losses.requires_grad:
            # images do not affect each other, so the gradient of the sum holds the gradient of each
            gradient = torch.autograd.grad(losses.sum(), leaf, materialize_grads=True)[0]
        else:
            gradient = torch.zeros_like(leaf)
    return Slope(D, losses.detach(), gradient)


def slope(
    denoiser: Denoiser, loss: Loss, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None
) -> Slope:
    """The loss of D(x) and its gradient by x: one evaluation of the denoiser and one backward pass through it."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        D = denoiser(leaf, sigma, condition)
        found = slope_at(loss_at(loss, sigma), D.detach())
        if not D.requires_grad:
            return found._replace(gradient=torch.zeros_like(leaf))
        # normalised for the backward pass: half precision inside the network can hold neither 1e-8 nor 1e5
        size = found.gradient.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(D.dtype).tiny)
        back = torch.autograd.grad(D, leaf, found.gradient / size, materialize_grads=True)[0]
        return found._replace(gradient=back * size)
