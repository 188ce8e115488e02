import pytest
import torch

from edm2kit.guidance.losses.gradient import slope
from edm2kit.guidance.losses.gradient_step import GradientStep, StepStart
from edm2kit.guidance.losses.polyak import PolyakStep, TruePolyakStep
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


def unchanged(x, sigma, labels=None):
    return x


def start_of_step(sigma=2.0):
    level = torch.tensor(sigma, dtype=torch.float64)
    return StepStart(X, level.reshape(1, 1, 1, 1), *slope(MIXTURE, SQUARES, X, level, None))


def lengths(x):
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


@pytest.mark.parametrize(("sigma", "sigma_next"), authors.STEPS)
def test_a_step_is_the_authors_own(sigma, sigma_next):
    # x' - step ||eps|| g / ||g||^2, g the gradient of the residual's norm by x, all variance-preserving, per image
    x = sigma * X + 0.3
    x_vp = authors.to_vp(x, sigma)
    noise, gradient = authors.residual_norm_slope(MIXTURE, lambda D: TARGET - D, x_vp, sigma)
    scale = 0.1 * lengths(noise) / lengths(gradient) ** 2
    shift = scale.reshape(-1, 1, 1, 1) * gradient
    theirs = authors.ddim(x_vp, noise, sigma, sigma_next) - shift
    two = torch.tensor([sigma, sigma_next]).double()
    ours = euler(GradientStep(MIXTURE, SQUARES, PolyakStep(0.1)), x / sigma, two)
    authors.assert_same_displacement(ours, theirs, x, sigma_next)
    push, their_push = ours - euler(MIXTURE, x / sigma, two), -authors.from_vp(shift, sigma_next)
    torch.testing.assert_close(push / their_push.norm(), their_push / their_push.norm(), atol=1e-6, rtol=0)


def test_true_polyak_reaches_the_lowest_of_an_affine_loss_in_one_step():
    slopes = torch.randn([2, 3, 3], generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def affine(D):
        return (D * slopes).sum((1, 2, 3)) + 30

    pushed = GradientStep(unchanged, affine, TruePolyakStep(lowest=-7.0))
    x = euler(pushed, X, torch.tensor([2.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(affine(x), torch.full([4], -7.0, dtype=torch.float64))


def test_only_true_polyak_keeps_its_step_when_the_unit_of_the_loss_changes():
    level = torch.tensor(2.0, dtype=torch.float64)
    scaled = StepStart(X, level.reshape(1, 1, 1, 1), *slope(MIXTURE, lambda D: 10 * SQUARES(D), X, level, None))
    at = start_of_step()
    torch.testing.assert_close(TruePolyakStep()(scaled, SIGMAS[1]), TruePolyakStep()(at, SIGMAS[1]))
    # the norm is the square root of the loss
    torch.testing.assert_close(PolyakStep()(scaled, SIGMAS[1]), PolyakStep()(at, SIGMAS[1]) / 10**0.5)


@pytest.mark.parametrize(("sigma", "sigma_next"), authors.STEPS)
def test_the_authors_guard_is_in_their_variables(sigma, sigma_next):
    # no step if the norm of their gradient, by a variance-preserving x, is below 1e-6
    level = torch.tensor(sigma, dtype=torch.float64)
    found = slope(MIXTURE, SQUARES, sigma * X, level, None)
    at = StepStart(sigma * X, level.reshape(1, 1, 1, 1), *found)
    by_vp = lengths(at.gradient / (2 * at.loss.sqrt().reshape(-1, 1, 1, 1))) * (1 + sigma**2) ** 0.5
    for wanted, moves in ((0.9e-6, False), (1.1e-6, True)):
        unit = (wanted / by_vp) ** 2  # the norm is the square root of the loss
        scaled = at._replace(loss=at.loss * unit, gradient=at.gradient * unit.reshape(-1, 1, 1, 1))
        shift = PolyakStep()(scaled, torch.tensor(sigma_next, dtype=torch.float64))
        assert ((lengths(shift) > 0) == moves).all()


def test_true_polyak_makes_no_step_on_a_plateau_whatever_the_unit():
    at = start_of_step()
    for unit in (1e-8, 1.0, 1e8):
        flat = at._replace(loss=at.loss * unit, gradient=1e-8 * at.gradient * unit)
        steep = at._replace(loss=at.loss * unit, gradient=1e-3 * at.gradient * unit)
        assert (lengths(TruePolyakStep()(flat, SIGMAS[1])) == 0).all()
        assert (lengths(TruePolyakStep()(steep, SIGMAS[1])) > 0).all()
