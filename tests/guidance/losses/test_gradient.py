import pytest
import torch

from edm2kit.guidance.losses.gradient import slope, slope_at
from edm2kit.guidance.losses.restoration import InpaintingOperator, Measurement
from edm2kit.guidance.losses.score import LossGuided
from tests.support.fakes import Mixture

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn([4, 2, 3, 3], generator=GENERATOR, dtype=torch.float64)
SIGMA = torch.tensor([0.1, 0.5, 2.0, 30.0], dtype=torch.float64)
MIXTURE = Mixture(torch.randn([3, 2, 3, 3], generator=GENERATOR), 0.2)
TARGET = torch.randn([2, 3, 3], generator=GENERATOR)
LOSS = Measurement(InpaintingOperator(torch.ones(1, 3, 3)), TARGET, 0.7)


def test_gradients_by_x_and_by_the_denoised_image():
    D, loss, gradient = slope_at(LOSS, X)
    assert torch.equal(D, X)
    torch.testing.assert_close(loss, ((X - TARGET) ** 2).sum((1, 2, 3)) / (2 * 0.7**2))
    torch.testing.assert_close(gradient, (X - TARGET) / 0.7**2)
    double = slope(lambda x, s, l: 2 * x, LOSS, X, SIGMA, None)
    torch.testing.assert_close(double.gradient, 2 * (2 * X - TARGET) / 0.7**2)


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_half_precision_inside_the_denoiser_keeps_gradients_of_any_size(unit):
    def half(x, sigma, labels=None):
        return (0.5 * x.half()).float()

    plain = slope(half, LOSS, X.float(), SIGMA, None).gradient
    scaled = slope(half, lambda D: unit * LOSS(D), X.float(), SIGMA, None).gradient
    torch.testing.assert_close(scaled / unit, plain, rtol=2e-3, atol=1e-5)


def test_a_loss_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"loss of 4 images has shape \[\]; expected one per image"):
        LossGuided(MIXTURE, lambda D: D.sum(), 1.0)(X, SIGMA)
