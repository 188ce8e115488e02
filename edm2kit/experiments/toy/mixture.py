"""Exact densities, scores and samples of a 2-D Gaussian mixture behind any amount of noise."""

import math
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from edm2kit.experiments.toy.tree import Components

# x 1016 Gaussians x 4 bytes: the arrays in between, three when compiled and a dozen when not, stay in a core's cache
_COMPILED_ROWS, _EAGER_ROWS = 256, 32


class Mixture:
    """The mixture `parts`, smoothed by N(0, sigma^2).

    Evaluated in the dtype of the points asked about. `compiled` has torch.compile fuse the 1016 Gaussians of a point
    into two passes over blocks of float32 points: several times faster, the same numbers up to rounding. It needs a
    C++ compiler (see `can_compile`).
    """

    def __init__(self, parts: Components, compiled: bool = False):
        self.parts = parts
        self.compiled = compiled
        columns = [parts.mu[:, 0], parts.mu[:, 1], parts.Sigma[:, 0, 0], parts.Sigma[:, 0, 1], parts.Sigma[:, 1, 1]]
        self._parameters = torch.stack([torch.from_numpy(parts.phi) / (2 * math.pi), *map(torch.from_numpy, columns)])
        self._factors = torch.linalg.cholesky(torch.from_numpy(parts.Sigma))

    def logp_and_score(self, x: torch.Tensor, sigma: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-density [N] of the points `x` [N,2] and its gradient [N,2]; `sigma` [N] or one for all, 0 included."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        parameters = self._parameters.to(x)
        whole = len(x) - len(x) % _COMPILED_ROWS if self.compiled and x.dtype == torch.float32 else 0
        blocks = [(_compiled(), x[:whole], sigma[:whole], _COMPILED_ROWS)] if whole else []
        blocks += [(_evaluate, x[whole:], sigma[whole:], _EAGER_ROWS)] if whole < len(x) or not whole else []
        answers = [
            evaluate(some_x.contiguous(), some_sigma.contiguous(), parameters)
            for evaluate, xs, sigmas, rows in blocks
            for some_x, some_sigma in zip(xs.split(rows), sigmas.split(rows), strict=True)
        ]
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
        """The branch that most likely made each of the points `x` [N,2], int64 [N]."""
        nearest = [
            _parts(some, some.new_zeros(1), self._parameters.to(x))[1].argmax(1) for some in x.split(_EAGER_ROWS)
        ]
        return torch.from_numpy(self.parts.branch)[torch.cat(nearest)]


def can_compile() -> bool:
    """Whether torch.compile finds what it needs on a CPU: a C++ compiler, and Python's headers for it."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    supported = sys.version_info < (3, 13) or torch.__version__ >= (2, 6)
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return supported and shutil.which(compiler) is not None and headers.is_file()


@cache
def _compiled() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return torch.compile(_evaluate, dynamic=False)


def _parts(
    x: torch.Tensor, sigma: torch.Tensor, parameters: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each Gaussian adds to the density at each point, over exp(`top`), and (Sigma + sigma^2)^-1 (x - mu).

    Returns top [N,1], then share, gx and gy, all [N,K].
    """
    phi, mu_x, mu_y, xx, xy, yy = parameters.unbind()
    xx, yy = xx + sigma[:, None] ** 2, yy + sigma[:, None] ** 2
    # the inverse of a 2x2 matrix written out: batched eigenvectors or solvers are fifty times slower
    inverse_det = 1 / (xx * yy - xy**2)
    dx, dy = x[:, :1] - mu_x, x[:, 1:] - mu_y
    gx, gy = (yy * dx - xy * dy) * inverse_det, (xx * dy - xy * dx) * inverse_det
    exponent = -(dx * gx + dy * gy) / 2
    # the largest exponent is taken out: finite however far a point is from every Gaussian, and no logarithm of each
    top = exponent.amax(1, keepdim=True)
    return top, phi * inverse_det.sqrt() * (exponent - top).exp(), gx, gy


def _evaluate(x: torch.Tensor, sigma: torch.Tensor, parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    top, share, gx, gy = _parts(x, sigma, parameters)
    total = share.sum(1)
    score = -torch.stack([(share * gx).sum(1), (share * gy).sum(1)], dim=1) / total[:, None]
    return top[:, 0] + total.log(), score
