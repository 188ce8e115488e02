import pytest
import torch

from edm2kit.guidance.losses.freedom import FreeDoMLevelStep, FreeDoMStep
from edm2kit.guidance.losses.gradient import slope
from edm2kit.guidance.losses.gradient_step import GradientStep, StepStart
from edm2kit.guidance.losses.restoration import InpaintingOperator, Measurement
from edm2kit.sampling.solvers import euler
from tests.support import authors
from tests.support.fakes import Mixture

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn([4, 2, 3, 3], generator=GENERATOR, dtype=torch.float64)
MIXTURE = Mixture(torch.randn([3, 2, 3, 3], generator=GENERATOR), 0.2)
TARGET = torch.randn([2, 3, 3], generator=GENERATOR)
SQUARES = Measurement(InpaintingOperator(torch.ones(1, 3, 3)), TARGET, 0.5**0.5)
SIGMAS = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)


def start_of_step(sigma=2.0):
    level = torch.tensor(sigma, dtype=torch.float64)
    return StepStart(X, level.reshape(1, 1, 1, 1), *slope(MIXTURE, SQUARES, X, level, None))


def lengths(x):
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


@pytest.mark.parametrize(("sigma", "sigma_next"), authors.STEPS)
def test_a_level_step_is_the_authors_own(sigma, sigma_next):
    # x' - 0.2 sqrt(a) * (gradient of the residual's norm by x), all variance-preserving
    x = sigma * X + 0.3
    x_vp = authors.to_vp(x, sigma)
    noise, gradient = authors.residual_norm_slope(MIXTURE, lambda D: TARGET - D, x_vp, sigma)
    shift = 0.2 * authors.alpha_bar(sigma).sqrt() * gradient
    theirs = authors.ddim(x_vp, noise, sigma, sigma_next) - shift
    two = torch.tensor([sigma, sigma_next]).double()
    ours = euler(GradientStep(MIXTURE, SQUARES, FreeDoMLevelStep(0.2)), x / sigma, two)
    authors.assert_same_displacement(ours, theirs, x, sigma_next)
    push, their_push = ours - euler(MIXTURE, x / sigma, two), -authors.from_vp(shift, sigma_next)
    torch.testing.assert_close(push / their_push.norm(), their_push / their_push.norm(), atol=1e-6, rtol=0)


def test_freedom_shift_has_the_rms_it_should():
    at = start_of_step()
    shift = FreeDoMStep(0.02)(at, SIGMAS[1])
    rms = (at.x - at.D).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(shift.square().mean((1, 2, 3)).sqrt(), 0.02 * (1 - 1 / 4) * rms)
    along = (shift * at.gradient).sum((1, 2, 3)) / (lengths(shift) * lengths(at.gradient))
    torch.testing.assert_close(along, torch.ones(4, dtype=torch.float64))
