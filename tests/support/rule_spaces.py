"""The variables in which authors state their rules: one step of their sampler, compared with ours."""

import math
from dataclasses import dataclass

import torch

from edm2kit.guidance.combine import Evaluation
from tests.support.fakes import Gaussian, Mixture

LEVELS = (0.02, 0.3, 1.0, 5.0, 60.0)
SHRINK = 0.8  # the next noise level, as a share of this one
GENERATOR = torch.Generator().manual_seed(7)
MEANS = torch.randn([3, 2, 8, 8], generator=GENERATOR, dtype=torch.float64)
NOISE = torch.randn([4, 2, 8, 8], generator=GENERATOR, dtype=torch.float64)
MAIN, WEAK, THIRD = Mixture(MEANS, 0.2), Mixture(0.6 * MEANS.roll(1, 0) + 0.1, 0.35), Gaussian(-0.2, 0.5)


@dataclass(frozen=True)
class Point:
    """Where two networks are evaluated in one step from `sigma` to `sigma_next`; everything float64 [4, 2, 8, 8]."""

    sigma: float
    i: int | None = None

    @property
    def sigma_next(self) -> float:
        return SHRINK * self.sigma

    @property
    def x(self) -> torch.Tensor:
        return MEANS[[0, 1, 2, 0]] + self.sigma * NOISE

    @property
    def at(self) -> Evaluation:
        return Evaluation(self.x, torch.tensor(self.sigma, dtype=torch.float64), None, self.i)

    def answer(self, denoiser) -> torch.Tensor:
        return denoiser(self.x, torch.tensor(self.sigma, dtype=torch.float64))

    @property
    def D(self) -> torch.Tensor:
        return self.answer(MAIN)

    @property
    def D_neg(self) -> torch.Tensor:
        return self.answer(WEAK)

    def our_step(self, D: torch.Tensor) -> torch.Tensor:
        """The displacement of x by an Euler step of the probability flow in EDM's variables."""
        return (self.sigma_next - self.sigma) * (self.x - D) / self.sigma


class NoiseSpace:
    """Networks predict the noise e of z = a y + s e, a^2 + s^2 = 1 (DDPM), and steps are DDIM's."""

    @staticmethod
    def scales(sigma: float) -> tuple[float, float]:
        return 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)

    def prediction(self, D, point):
        a, s = self.scales(point.sigma)
        return (a * point.x - a * D) / s

    def step(self, e, point):
        (a, s), (a_next, s_next) = self.scales(point.sigma), self.scales(point.sigma_next)
        y = (a * point.x - s * e) / a
        return (a_next * y + s_next * e) / a_next - point.x


class VelocitySpace:
    """Networks predict v = e - y of z = (1 - t) y + t e (rectified flow), and steps are Euler's."""

    def prediction(self, D, point):
        t = point.sigma / (1 + point.sigma)
        z = (1 - t) * point.x
        return (z - D) / t

    def step(self, v, point):
        t, t_next = (sigma / (1 + sigma) for sigma in (point.sigma, point.sigma_next))
        z = (1 - t) * point.x + (t_next - t) * v
        return z / (1 - t_next) - point.x


class ScoreSpace:
    """Networks give the score of x, and steps are Euler's on dx = -sigma score dsigma."""

    def prediction(self, D, point):
        return (D - point.x) / point.sigma**2

    def step(self, score, point):
        return -(point.sigma_next - point.sigma) * point.sigma * score


class DenoisedSpace(VelocitySpace):
    """A rectified flow whose networks' velocities are turned into images y before they are combined."""

    def prediction(self, D, point):
        t = point.sigma / (1 + point.sigma)
        return (1 - t) * point.x - t * super().prediction(D, point)

    def step(self, y, point):
        return super().step(VelocitySpace.prediction(self, y, point), point)


def per_image(function, *images: torch.Tensor) -> torch.Tensor:
    """`function` of the images one by one, each flat, as most authors write their formulas."""
    results = [function(*(image.flatten() for image in row)) for row in zip(*images, strict=True)]
    return torch.stack(results).reshape(images[0].shape)


def check_authors_step(rule, authors, space, weight: float, i: int | None = None) -> None:
    """`rule` moves x like `authors`(prediction, negative prediction, point) do in their variables, at five levels."""
    for sigma in LEVELS:
        point = Point(sigma, i)
        ours = point.our_step(rule(point.D, [point.D_neg], [weight], point.at))
        predictions = (space.prediction(D, point) for D in (point.D, point.D_neg))
        theirs = space.step(authors(*predictions, point), point)
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-6, f"sigma {sigma:g}: relative difference {error:.1e}"
        unguided = point.our_step(point.D)
        assert (ours - unguided).abs().max() > 1e-6 * unguided.abs().max(), f"sigma {sigma:g}: nothing is guided"
