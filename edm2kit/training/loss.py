"""The training loss of EDM2 (Karras et al. 2023, Section 2.1 and Eq. 21)."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from edm2kit.torch_utils.rng import RandomSource, StackedGenerator

# edges in units of P_std around P_mean; the bins hold 10, 15, 25, 25, 15 and 10 % of the images
_SIGMA_BINS = (-1.28, -0.67, 0.0, 0.67, 1.28)


def noise_bins(P_mean: float, P_std: float) -> list[tuple[str, float, float]]:
    """The ranges of noise levels whose losses are logged: (name, lowest sigma, sigma below which it ends).

    Example: `noise_bins(-0.4, 1.0)[0]` is `("loss/sigma_0_0.186", 0.0, 0.186...)`.
    """
    edges = [0.0, *(math.exp(P_mean + z * P_std) for z in _SIGMA_BINS), math.inf]
    return [(f"loss/sigma_{low:.3g}_{high:.3g}", low, high) for low, high in itertools.pairwise(edges)]


class LossTerms(NamedTuple):
    """`loss` [N, C, H, W], differentiable; `sigma` [N], the noise level of each image."""

    loss: torch.Tensor
    sigma: torch.Tensor


class TrainingLoss(Protocol):
    """A loss that the training loop can use: unreduced terms, with random numbers from one generator per image."""

    def terms(
        self, net: Callable, images: torch.Tensor, labels: torch.Tensor | None, rng: StackedGenerator
    ) -> LossTerms: ...


class _GlobalRandom:
    """torch's global generator of a device, as a RandomSource."""

    def __init__(self, device: torch.device):
        self.device = device

    def randn(self, size: list[int]) -> torch.Tensor:
        return torch.randn(size, device=self.device)

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        return torch.randn_like(x)


class EDM2Loss:
    """Weighted denoising error with learned uncertainty u: lambda / e^u * (D(x + sigma n) - x)^2 + u.

    ln(sigma) ~ N(P_mean, P_std^2); lambda = (sigma^2 + sigma_data^2) / (sigma * sigma_data)^2. The loss is unreduced;
    the training loop sums it and divides by the global batch size. Karras et al. 2023, Section 2.1 and Eq. 21.

    Example: `EDM2Loss(P_mean=-0.8, P_std=1.6)(net, images, labels).sum().div(len(images)).backward()`
    """

    def __init__(self, P_mean: float = -0.4, P_std: float = 1.0, sigma_data: float = 0.5):
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data

    def __repr__(self) -> str:
        return f"EDM2Loss(P_mean={self.P_mean:g}, P_std={self.P_std:g}, sigma_data={self.sigma_data:g})"

    def terms(
        self,
        net: Callable,
        images: torch.Tensor,
        labels: torch.Tensor | None,
        rng: RandomSource | None = None,
    ) -> LossTerms:
        """The loss and the noise level of each image; arguments as in `__call__`."""
        rng = _GlobalRandom(images.device) if rng is None else rng
        # noise level before noise: the order is part of the golden values
        sigma = (rng.randn([images.shape[0], 1, 1, 1]) * self.P_std + self.P_mean).exp()
        noise = rng.randn_like(images)
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        denoised, logvar = net(images + noise * sigma, sigma.flatten(), labels, return_logvar=True)
        loss = (weight / logvar.exp()) * (denoised - images) ** 2 + logvar
        return LossTerms(loss, sigma.flatten().detach())

    def __call__(
        self,
        net: Callable,
        images: torch.Tensor,
        labels: torch.Tensor | None,
        rng: RandomSource | None = None,
    ) -> torch.Tensor:
        """The loss of every element, [N, C, H, W].

        `net(x, sigma, labels, return_logvar=True)` returns D and u. `images` float32 [N, C, H, W], encoded; `labels`
        float32 [N, K] or None; `rng` a StackedGenerator with one generator per image, or None to use torch's global
        generator.
        """
        return self.terms(net, images, labels, rng).loss
