"""Heun steps corrected in the direction in which the slope changes most: ERK-Guid, an embedded Runge-Kutta method."""

from dataclasses import dataclass

import torch

from edm2kit.denoiser import Denoiser, after_step, for_step
from edm2kit.sampling.churn import NO_CHURN, Churn, RandnLike


@dataclass(frozen=True)
class Stiffness:
    """How strongly to correct (`w_stiff`; 0 is Heun), and from which stiffness on (`w_con`).

    Published from 0.5 to 2.5 (more for more steps), and from 0.1 to 0.5. Raises ValueError on a negative one.
    """

    w_stiff: float = 1.0
    w_con: float = 0.25

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"{name} is {value:g}; expected a number of at least 0")


DEFAULT = Stiffness()


def stiffness_of(
    x: torch.Tensor, d: torch.Tensor, x_before: torch.Tensor, d_before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How fast the slope changes from one point to another at the same noise level, and in which direction.

    Points and slopes [N,C,H,W]. Returns |d - d'| / |x - x'| per image, [N,1,1,1], and the unit vector along d - d';
    both 0 where nothing changes.
    """
    pixels = tuple(range(1, x.ndim))
    change = d - d_before
    length = torch.linalg.vector_norm(change, dim=pixels, keepdim=True)
    distance = torch.linalg.vector_norm(x - x_before, dim=pixels, keepdim=True)
    known = (length > 0) & (distance > 0)
    return torch.where(known, length / distance, 0.0), torch.where(known, change / length, 0.0)


@torch.no_grad()
def erk(
    denoiser: Denoiser,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    labels: torch.Tensor | None = None,
    randn_like: RandnLike = torch.randn_like,
    churn: Churn = NO_CHURN,
    stiffness: Stiffness = DEFAULT,
) -> torch.Tensor:
    """Heun steps, each then moved by -h z^2 <d, v> v; the same 2N - 1 evaluations for N steps.

    v is the direction in which the slope differs between where the last step's Euler half arrived and where the step
    itself did, rho the rate of it, h the width of the step, and z = w_stiff h rho. Images with rho up to `w_con` stay
    where Heun takes them, as do all in the first step, the last, and those that added noise (the two points would lie
    at different noise levels). Other arguments as in `solvers.heun`. ERK-Guid; see docs/guidance.md.
    """
    x, euler_point = noise.to(sigmas.dtype) * sigmas[0], None
    for i in range(len(sigmas) - 1):
        D = for_step(denoiser, i, sigmas)
        x_hat, sigma_hat = churn.raise_noise(x, i, sigmas, randn_like)
        sigma_next = sigmas[i + 1]
        d = (x_hat - D(x_hat, sigma_hat, labels).to(x.dtype)) / sigma_hat
        x = x_hat + (sigma_next - sigma_hat) * d
        if i < len(sigmas) - 2:
            d_next = (x - D(x, sigma_next, labels).to(x.dtype)) / sigma_next
            arrived = (x, d_next)
            x = x_hat + (sigma_next - sigma_hat) * (d + d_next) / 2
            if euler_point is not None and sigma_hat == sigmas[i]:
                x = x + _correction(x_hat, d, *euler_point, sigma_hat - sigma_next, stiffness)
            euler_point = arrived
        x = after_step(D, x, i, sigmas)
    return x


def _correction(
    x: torch.Tensor,
    d: torch.Tensor,
    x_before: torch.Tensor,
    d_before: torch.Tensor,
    h: torch.Tensor,
    stiffness: Stiffness,
) -> torch.Tensor:
    rho, v = stiffness_of(x, d, x_before, d_before)
    along = (d * v).sum(dim=tuple(range(1, d.ndim)), keepdim=True)
    return torch.where(rho > stiffness.w_con, -h * (stiffness.w_stiff * h * rho) ** 2 * along * v, 0.0)
