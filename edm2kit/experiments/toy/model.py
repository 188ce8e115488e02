"""The toy's network, a learned log-density, and denoisers made from scores."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edm2kit.models.layers import MPConv, mp_silu

SIGMA_DATA = 0.5
_HIDDEN_LAYERS = 4
_BLOCK = 2048  # points whose activations stay in a core's cache


class ToyNet(nn.Module):
    """An unnormalised log-density of noisy 2-D points, whose gradient is the score.

    Magnitude-preserving layers without biases; `gain` starts at 0, which is a Gaussian. Karras et al. 2024,
    "Guiding a Diffusion Model with a Bad Version of Itself", Appendix C.
    """

    def __init__(self, width: int):
        super().__init__()
        first = MPConv(4, width, [])
        self.layers = nn.ModuleList([first, *(MPConv(width, width, []) for _ in range(_HIDDEN_LAYERS))])
        self.gain = nn.Parameter(torch.zeros([]))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """log p(x; sigma) [N], up to a constant that depends on sigma. `x` [N,2], `sigma` [N] or a scalar above 0."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        scaled = x / (sigma**2 + SIGMA_DATA**2).sqrt()[:, None]
        y = torch.cat([scaled, sigma.log()[:, None] / 4, torch.ones_like(sigma)[:, None]], dim=1)
        for layer in self.layers[:-1]:
            y = mp_silu(layer(y))
        y = self.layers[-1](y)
        return (y**2).mean(1) * self.gain / sigma - (scaled**2).sum(1) / 2

    def score(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The gradient of log p with respect to `x`, [N,2]; differentiable itself, for training."""
        return torch.func.grad(lambda points: self(points, sigma).sum())(x)


Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x [N,2], sigma [N] -> [N,2]


@dataclass(frozen=True)
class Blockwise:
    """`score`, block by block; full blocks use `fast`, a faster function with the same result."""

    score: Score
    fast: Score

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        blocks = zip(x.split(_BLOCK), sigma.split(_BLOCK), strict=True)
        answers = []
        for points, sigmas in blocks:
            evaluate = self.fast if len(points) == _BLOCK else self.score
            answers.append(evaluate(points, sigmas))
        return torch.cat(answers)


def fast_score(net: ToyNet, compiled: bool) -> Blockwise:
    """The score of a trained network for many points; `compiled` makes it four times as fast after the first block."""
    return Blockwise(net.score, torch.compile(net.score, dynamic=False) if compiled else net.score)


@dataclass(frozen=True)
class ScoreDenoiser:
    """The denoiser x + sigma^2 * score(x, sigma) of points as "images" of two channels and one pixel, [N,2,1,1].

    There is one class only: the condition is ignored.
    """

    score: Score

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: Any = None, /) -> torch.Tensor:
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        D = x.flatten(1) + sigma[:, None] ** 2 * self.score(x.flatten(1), sigma)
        return D.reshape(x.shape)
