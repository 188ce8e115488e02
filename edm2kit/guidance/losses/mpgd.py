"""Manifold-preserving guidance (MPGD): the gradient of the loss without a backward pass through the denoiser.

He et al. 2024 (arXiv 2311.16424). The gradient stops at the denoised image, and the slope of the denoiser is that of
Gaussian data. `LossGuided` and `GradientStep` use it with `backprop=False`.
"""

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser
from edm2kit.guidance.losses.gradient import Slope, column, slope_at
from edm2kit.guidance.losses.loss import Loss, loss_at


def slope_without_backprop(
    denoiser: Denoiser,
    loss: Loss,
    x: torch.Tensor,
    sigma: torch.Tensor,
    condition: ConditionLike = None,
    sigma_data: float = 0.5,
) -> Slope:
    """The loss of D(x) and its gradient by x, the slope of D taken to be sigma_d^2 / (sigma^2 + sigma_d^2)."""
    found = slope_at(loss_at(loss, sigma), denoiser(x, sigma, condition))
    share = sigma_data**2 / (column(sigma, x) ** 2 + sigma_data**2)
    return found._replace(gradient=share * found.gradient)
