"""The loss that the data allow to expect, against closed forms and a filter that is really applied."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from edm2kit.data.dataset import Source
from edm2kit.data.labels import ConditionSpace
from edm2kit.experiments.runs.expected_loss import (
    DataMoments,
    filter_loss,
    filter_loss_between,
    loss_weight,
    measure_moments,
)
from edm2kit.models.encoders import make_encoder
from edm2kit.training.loss import EDM2Loss

SIZE = 8


class Images(Source):
    """Images from an array of pixels, uint8 [N, C, H, W]."""

    path, item_dtype, condition_space, labels = Path("array"), np.dtype(np.uint8), ConditionSpace(), None

    def __init__(self, pixels):
        self.pixels, self.item_shape = pixels, pixels.shape[1:]

    def __len__(self):
        return len(self.pixels)

    def read(self, indices):
        return self.pixels[indices]

    def identity(self):
        return {}


def smooth_images(count: int) -> np.ndarray:
    """Gaussian images with much low and little high frequency, colours that go together, and a mean that is not 0."""
    rng = np.random.default_rng(0)
    f = np.fft.fftfreq(SIZE)
    decay = 1 / (0.1 + np.hypot(f[:, None], f[None, :]))
    grey, colour = rng.standard_normal((count, 1, SIZE, SIZE)), rng.standard_normal((count, 3, SIZE, SIZE))
    values = np.fft.ifft2(np.fft.fft2(grey + 0.3 * colour) * decay).real
    ramp = np.linspace(-20, 60, SIZE)
    return np.clip(128 + 12 * values + ramp, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pixels():
    return smooth_images(1000)


@pytest.fixture(scope="module")
def moments(pixels) -> DataMoments:
    return measure_moments(Images(pixels), make_encoder({"kind": "rgb"}))


@pytest.fixture(scope="module")
def encoded(pixels):
    return make_encoder({"kind": "rgb"}).encode(torch.from_numpy(pixels), None).double().numpy()


def test_moments_are_those_of_the_images(moments, encoded):
    assert moments.num_images == 1000
    assert moments.mean_square == pytest.approx(np.mean(encoded**2), rel=1e-6)
    assert moments.variance == pytest.approx(np.mean(np.var(encoded, axis=0)), rel=1e-6)


@pytest.mark.parametrize("sigma", [0.05, 0.4, 3.0])
def test_the_error_is_that_of_a_filter_applied_to_noisy_images(moments, encoded, sigma):
    """The filter is built here from the covariance of colours at each frequency, and applied."""
    mean = encoded.mean(axis=0)
    spectra = np.fft.fft2(encoded - mean, norm="ortho")
    S = np.einsum("nihw,njhw->hwij", spectra, spectra.conj()) / len(encoded)
    W = S @ np.linalg.inv(S + sigma**2 * np.eye(3))
    noisy = encoded + sigma * np.random.default_rng(1).standard_normal(encoded.shape)
    filtered = np.einsum("hwij,njhw->nihw", W, np.fft.fft2(noisy - mean, norm="ortho"))
    D = np.fft.ifft2(filtered, norm="ortho")
    assert np.abs(D.imag).max() < 1e-9
    assert np.mean((D.real + mean - encoded) ** 2) == pytest.approx(moments.filter_error(sigma), rel=0.02)


def test_limits_at_high_and_low_noise(moments):
    """Guessing the mean image at high noise, the identity at low noise."""
    assert moments.filter_error(1e4) == pytest.approx(moments.variance, rel=1e-3)
    assert moments.filter_error(1e-4) == pytest.approx(1e-8, rel=1e-3)
    assert filter_loss(moments, 1e4, 0.5) == pytest.approx(1 + math.log(moments.variance / 0.25), abs=1e-3)


@pytest.mark.parametrize("sigma", [0.01, 0.5, 20.0])
def test_white_data_leave_nothing_to_learn(sigma):
    """If neighbouring pixels have nothing in common, the weighted error of the best denoiser is 1, and the loss 1."""
    white = DataMoments(0.25, np.full((3, 4, 4), 0.25), 100)
    assert filter_loss(white, sigma, 0.5) == pytest.approx(1)
    assert loss_weight(sigma, 0.5) * white.skip_error(sigma, 0.5) == pytest.approx(1)
    assert filter_loss_between(white, 0.0, math.inf, -0.4, 1.0, 0.5) == pytest.approx(1)


def test_a_network_that_puts_out_zero_has_the_loss_of_the_skip(moments, encoded):
    """EDM2's loss of D = c_skip x and u = 0, over noise levels as training draws them."""

    def net(x, sigma, labels, return_logvar):
        c_skip = 0.25 / (sigma**2 + 0.25)
        return c_skip[:, None, None, None] * x, torch.zeros(len(x), 1, 1, 1)

    torch.manual_seed(0)
    images = torch.from_numpy(encoded).float()
    loss, sigma = EDM2Loss(-0.4, 1.0).terms(net, images, None)
    expected = [loss_weight(float(s), 0.5) * moments.skip_error(float(s), 0.5) for s in sigma]
    assert float(loss.mean()) == pytest.approx(np.mean(expected), rel=0.05)


def test_fitted_uncertainty_makes_the_loss_one_plus_the_logarithm(moments, encoded):
    """u = ln(weighted error) is the best constant u, and then the loss is what `filter_loss` returns."""
    error = 0.3
    losses = {u: error / math.exp(u) + u for u in (math.log(error) + d for d in (-0.1, 0.0, 0.1))}
    assert min(losses, key=losses.get) == pytest.approx(math.log(error))
    assert min(losses.values()) == pytest.approx(1 + math.log(error))


def test_the_mean_over_a_range_is_that_of_training(moments):
    rng = np.random.default_rng(0)
    levels = np.exp(-0.4 + rng.standard_normal(4000))
    for low, high in ((0.0, 0.2), (0.2, 1.0), (1.0, math.inf)):
        inside = levels[(levels >= low) & (levels < high)]
        expected = np.mean([filter_loss(moments, sigma, 0.5) for sigma in inside[:400]])
        assert filter_loss_between(moments, low, high, -0.4, 1.0, 0.5) == pytest.approx(expected, abs=0.05)


def test_no_denoiser_that_knows_less_is_better(moments):
    for sigma in np.geomspace(0.01, 100, 20):
        assert moments.filter_error(sigma) <= moments.skip_error(sigma, 0.5) + 1e-12
