import torch

from edm2kit.guidance.losses.freedom import FreeDoMStep
from edm2kit.guidance.losses.gradient import slope
from edm2kit.guidance.losses.gradient_step import StepStart
from edm2kit.guidance.losses.restoration import InpaintingOperator, Measurement
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


def test_freedom_shift_has_the_rms_it_should():
    at = start_of_step()
    shift = FreeDoMStep(0.02)(at, SIGMAS[1])
    rms = (at.x - at.D).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(shift.square().mean((1, 2, 3)).sqrt(), 0.02 * (1 - 1 / 4) * rms)
    along = (shift * at.gradient).sum((1, 2, 3)) / (lengths(shift) * lengths(at.gradient))
    torch.testing.assert_close(along, torch.ones(4, dtype=torch.float64))
