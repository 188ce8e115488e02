import torch

from edm2kit.guidance.losses.restoration import InpaintingOperator, Measurement
from edm2kit.guidance.losses.score import LossGuided
from tests.support.fakes import Gaussian

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn([4, 2, 3, 3], generator=GENERATOR, dtype=torch.float64)
SIGMA = torch.tensor([0.1, 0.5, 2.0, 30.0], dtype=torch.float64)
TARGET = torch.randn([2, 3, 3], generator=GENERATOR)
LOSS = Measurement(InpaintingOperator(torch.ones(1, 3, 3)), TARGET, 0.7)


def test_for_gaussian_data_no_gradient_through_the_denoiser_is_needed():
    net = Gaussian(0.2, 0.25)
    through, without = LossGuided(net, LOSS, 2.0), LossGuided(net, LOSS, 2.0, backprop=False)
    torch.testing.assert_close(without(X, SIGMA), through(X, SIGMA))
    other = LossGuided(net, LOSS, 2.0, backprop=False, sigma_data=1.0)
    assert (other(X, SIGMA) - through(X, SIGMA)).abs().max() > 0.1
