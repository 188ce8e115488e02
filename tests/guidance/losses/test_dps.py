import torch

from edm2kit.guidance.losses.dps import DPSStep
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


def test_dps_divides_by_the_residual():
    at = start_of_step()
    residual = lengths(at.D - TARGET)
    shift = DPSStep(0.7)(at, SIGMAS[1])
    torch.testing.assert_close(shift, 0.7 * at.gradient / residual.reshape(-1, 1, 1, 1))
