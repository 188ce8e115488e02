"""Exact densities, scores and samples of a 2-D Gaussian mixture with any amount of added noise."""

import math
from collections.abc import Callable
from functools import cache

import torch

from edm2kit.experiments.toy.tree import Components

# Points per block. Times 1016 Gaussians and 4 bytes, the intermediate arrays (3 if compiled, else 12) stay in the cache
_COMPILED_ROWS, _EAGER_ROWS = 256, 32


class Mixture:
    """The mixture `parts`, smoothed by N(0, sigma^2).

    Evaluated in the dtype of the given points. With `compiled`, torch.compile fuses the 1016 Gaussians into two passes
    over blocks of float32 points: several times faster, equal up to rounding. Needs a C++ compiler (see `can_compile`).
    """

    def __init__(self, parts: Components, compiled: bool = False):
        self.parts = parts
        self.compiled = compiled
        columns = [parts.mu[:, 0], parts.mu[:, 1], parts.Sigma[:, 0, 0], parts.Sigma[:, 0, 1], parts.Sigma[:, 1, 1]]
        self._parameters = torch.stack([torch.from_numpy(parts.phi) / (2 * math.pi), *map(torch.from_numpy, columns)])
        self._factors = torch.linalg.cholesky(torch.from_numpy(parts.Sigma))

    def logp_and_score(self, x: torch.Tensor, sigma: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-density [N] of the points `x` [N,2] and its gradient [N,2]; `sigma` [N] or a scalar, 0 allowed."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        parameters = self._parameters.to(x)
        num_compiled = 0  # only full blocks: torch.compile would recompile for a shorter one
        if self.compiled and x.dtype == torch.float32:
            num_compiled = len(x) - len(x) % _COMPILED_ROWS
        answers = []
        if num_compiled > 0:
            answers += _in_blocks(_compiled(), x[:num_compiled], sigma[:num_compiled], parameters, _COMPILED_ROWS)
        if num_compiled < len(x) or len(x) == 0:
            answers += _in_blocks(_evaluate, x[num_compiled:], sigma[num_compiled:], parameters, _EAGER_ROWS)
        logp, score = zip(*answers, strict=True)
        return torch.cat(logp), torch.cat(score)

    def logp(self, x: torch.Tensor, sigma: torch.Tensor | float = 0.0) -> torch.Tensor:
        """Log-density [N] of the points `x` [N,2]."""
        return self.logp_and_score(x, sigma)[0]

    def score(self, x: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        """Gradient [N,2] of the log-density at the points `x` [N,2]."""
        return self.logp_and_score(x, sigma)[1]

    def sample(self, num: int, generator: torch.Generator, sigma: float = 0.0) -> torch.Tensor:
        """`num` points, float32 [num,2]."""
        edges = torch.from_numpy(self.parts.phi).cumsum(0)
        u = torch.rand(num, generator=generator, dtype=torch.float64)
        k = torch.searchsorted(edges / edges[-1], u).clamp(max=len(edges) - 1)
        normal = torch.randn(2, num, 2, generator=generator, dtype=torch.float64)
        x = torch.from_numpy(self.parts.mu)[k] + torch.einsum("nij,nj->ni", self._factors[k], normal[0])
        return (x + sigma * normal[1]).float()

    def branch_of(self, x: torch.Tensor) -> torch.Tensor:
        """The most likely branch of each of the points `x` [N,2], int64 [N]."""
        nearest = []
        for points in x.split(_EAGER_ROWS):
            _, share, _, _ = _parts(points, points.new_zeros(1), self._parameters.to(x))
            nearest.append(share.argmax(1))
        return torch.from_numpy(self.parts.branch)[torch.cat(nearest)]


Evaluate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@cache
def _compiled() -> Evaluate:
    return torch.compile(_evaluate, dynamic=False)


def _in_blocks(
    evaluate: Evaluate, x: torch.Tensor, sigma: torch.Tensor, parameters: torch.Tensor, rows: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    blocks = zip(x.split(rows), sigma.split(rows), strict=True)
    return [evaluate(points.contiguous(), sigmas.contiguous(), parameters) for points, sigmas in blocks]


def _parts(
    x: torch.Tensor, sigma: torch.Tensor, parameters: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Share of each Gaussian in the density at each point, divided by exp(`top`), and (Sigma + sigma^2)^-1 (x - mu).

    Returns top [N,1], then share, gx and gy, all [N,K].
    """
    phi, mu_x, mu_y, xx, xy, yy = parameters.unbind()
    xx, yy = xx + sigma[:, None] ** 2, yy + sigma[:, None] ** 2
    # the inverse of a 2x2 matrix written out: batched eigenvectors or solvers are fifty times slower
    inverse_det = 1 / (xx * yy - xy**2)
    dx, dy = x[:, :1] - mu_x, x[:, 1:] - mu_y
    gx, gy = (yy * dx - xy * dy) * inverse_det, (xx * dy - xy * dx) * inverse_det
    exponent = -(dx * gx + dy * gy) / 2
    # subtracting the largest exponent keeps the sum finite for points far from every Gaussian
    top = exponent.amax(1, keepdim=True)
    return top, phi * inverse_det.sqrt() * (exponent - top).exp(), gx, gy


def _evaluate(x: torch.Tensor, sigma: torch.Tensor, parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    top, share, gx, gy = _parts(x, sigma, parameters)
    total = share.sum(1)
    score = -torch.stack([(share * gx).sum(1), (share * gy).sum(1)], dim=1) / total[:, None]
    return top[:, 0] + total.log(), score
