import torch

from edm2kit.guidance.losses.gradient import slope
from edm2kit.guidance.losses.gradient_step import GradientStep, StepStart
from edm2kit.guidance.losses.polyak import PolyakStep, TruePolyakStep
from edm2kit.guidance.losses.restoration import InpaintingOperator, Measurement
from edm2kit.sampling.solvers import euler
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


def test_polyak_as_coded_has_the_length_of_the_noise_over_that_of_the_gradient():
    at = start_of_step()
    expected = 0.1 * lengths((at.x - at.D) / 2.0) / lengths(at.gradient)
    torch.testing.assert_close(lengths(PolyakStep(0.1)(at, SIGMAS[1])), expected)


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
    torch.testing.assert_close(PolyakStep()(scaled, SIGMAS[1]), PolyakStep()(at, SIGMAS[1]) / 10)
