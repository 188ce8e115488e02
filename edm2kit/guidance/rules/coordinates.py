"""What several rules measure: inner products and norms per image, and the velocities that some authors combine."""

import torch

from edm2kit.guidance.combine import Evaluation


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The inner product of `a` and `b` per image, over all values: [N, C, H, W] -> [N, 1, 1, 1]."""
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


def length(a: torch.Tensor) -> torch.Tensor:
    """The norm of `a` per image, over all values: [N, C, H, W] -> [N, 1, 1, 1]."""
    return torch.linalg.vector_norm(a, dim=tuple(range(1, a.ndim)), keepdim=True)


def ratio(a: torch.Tensor, b: torch.Tensor, otherwise: float) -> torch.Tensor:
    """a / b, and `otherwise` if b is 0."""
    return torch.where(b != 0, a / torch.where(b != 0, b, 1), otherwise)


def noise_level(at: Evaluation, D: torch.Tensor) -> torch.Tensor:
    """The noise level of the evaluation, in the dtype and a shape that combine with `D`."""
    return torch.as_tensor(at.sigma, dtype=D.dtype, device=D.device).reshape(-1, *[1] * (D.ndim - 1))


def shortened_velocity(D: torch.Tensor, at: Evaluation) -> torch.Tensor:
    """The velocity of a rectified flow, times sigma / (1 + sigma): x / (1 + sigma) - D.

    In a rectified flow (Liu et al. 2022) z = (1 - t) y + t n, and networks predict the velocity n - y. With
    x = y + sigma n this is t = sigma / (1 + sigma), z = x / (1 + sigma), and n - y = (x - D) / sigma - D. The factor
    depends on the noise level only; without it small differences survive rounding at high noise levels.
    """
    sigma = noise_level(at, D)
    return at.x.to(D.dtype) / (1 + sigma) - D
