import pytest
import torch

from edm2kit.guidance.losses.dps import DPSStep
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


@pytest.mark.parametrize(("sigma", "sigma_next"), [*authors.STEPS, (0.05, 0.0)])
def test_a_step_is_the_authors_own(sigma, sigma_next):
    # Alg. 1 of Chung et al. after a DDIM step: x' - step * (gradient of ||y - A(x_0)|| by x), all variance-preserving
    x = sigma * X + 0.3
    x_vp = authors.to_vp(x, sigma)
    noise, gradient = authors.residual_norm_slope(MIXTURE, lambda D: TARGET - D, x_vp, sigma)
    theirs = authors.ddim(x_vp, noise, sigma, sigma_next) - 0.3 * gradient
    ours = euler(GradientStep(MIXTURE, SQUARES, DPSStep(0.3)), x / sigma, torch.tensor([sigma, sigma_next]).double())
    authors.assert_same_displacement(ours, theirs, x, sigma_next)
    push = ours - euler(MIXTURE, x / sigma, torch.tensor([sigma, sigma_next]).double())
    their_push = -0.3 * gradient / authors.alpha_bar(sigma_next).sqrt()
    torch.testing.assert_close(push / their_push.norm(), their_push / their_push.norm(), atol=1e-6, rtol=0)


def test_a_loss_that_is_no_square_is_refused():
    level = torch.tensor(2.0, dtype=torch.float64)
    at = StepStart(X, level.reshape(1, 1, 1, 1), *slope(MIXTURE, lambda D: SQUARES(D) - 1000, X, level, None))
    with pytest.raises(ValueError, match="needs a loss that is a square"):
        DPSStep()(at, SIGMAS[1])
