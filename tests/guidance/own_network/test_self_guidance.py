import math

import pytest
import torch

from edm2kit.guidance.own_network.self_guidance import ToldMoreNoise, later_noise_level
from edm2kit.guidance.registry import METHODS, Choice, Parts, guide
from tests.support.fakes import Counting, Gaussian
from tests.support.rule_spaces import LEVELS, MAIN, NoiseSpace, Point

SHIFT = 0.01


def ddpm_scales(t):
    """a and s of z = a y + s e at time t, with the integral of beta from 0.1 to 20 summed up numerically."""
    times = torch.linspace(0, t, 100_001, dtype=torch.float64)
    a = math.exp(-torch.trapezoid(0.1 + 19.9 * times, times).item() / 2)
    return a, math.sqrt(1 - a**2)


def time_of(sigma):
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        a, s = ddpm_scales(middle)
        low, high = (middle, high) if s / a < sigma else (low, middle)
    return low


def noise_predictor(denoiser):
    """What the authors' network is: z and a time -> noise."""

    def predict(z, t):
        a, s = ddpm_scales(t)
        D = denoiser(z / a, torch.tensor(s / a, dtype=torch.float64))
        return (z - a * D) / s

    return predict


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_the_authors_step_in_noise_predictions(weight):
    space, predict = NoiseSpace(), noise_predictor(MAIN)
    guided = guide(Choice("self-guidance", weight), Parts(MAIN))
    for sigma in LEVELS:
        point, t = Point(sigma), time_of(sigma)
        z = NoiseSpace.scales(sigma)[0] * point.x
        e, e_later = predict(z, t), predict(z, t + SHIFT)
        theirs = space.step(e_later + weight * (e - e_later), point)
        ours = point.our_step(guided(point.x, torch.tensor(sigma, dtype=torch.float64)))
        assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()
        assert (ours - point.our_step(point.D)).abs().max() > 1e-6 * theirs.abs().max()


def test_denoised_images_would_be_another_negative():
    sigma = torch.tensor(1.0, dtype=torch.float64)
    point = Point(1.0)
    later = later_noise_level(sigma, SHIFT)
    negative = ToldMoreNoise(MAIN, SHIFT)(point.x, sigma)
    assert (negative - MAIN(point.x, later)).abs().max() > 1e-3


def test_a_gaussian_in_closed_form():
    # unit variance, mean 0: e = z s, so the negative is x (1 - sigma s), s the noise's share at the later time
    sigma = torch.tensor(0.7, dtype=torch.float64)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    s = later_noise_level(sigma, 0.1)
    share = s / (1 + s**2).sqrt()
    expected = 1 - sigma * share / (1 + sigma**2).sqrt()
    torch.testing.assert_close(ToldMoreNoise(Gaussian(0.0, 1.0), 0.1)(x, sigma).squeeze(), expected)


def test_time_ends_and_never_runs_backwards():
    levels = torch.tensor([0.002, 1.0, 80.0, 150.0, 500.0])
    later = later_noise_level(levels, SHIFT)
    assert (later[:3] > levels[:3]).all()
    assert later[3].item() == pytest.approx(152.17, abs=0.1)
    assert later[4] == 500
    assert later.dtype == torch.float32


def test_a_level_per_image_and_the_condition_passes_on():
    net = Counting(MAIN)
    point = Point(0.7)
    labels = torch.full([4, 3], 1 / 3, dtype=torch.float64)
    levels = torch.tensor([0.7, 0.7, 2.0, 2.0], dtype=torch.float64)
    D = ToldMoreNoise(net, SHIFT)(point.x, levels, labels)
    torch.testing.assert_close(D[:2], ToldMoreNoise(MAIN, SHIFT)(point.x, levels[0], labels)[:2])
    assert net.calls[0][1] is labels


def test_a_wrong_shift_is_refused():
    with pytest.raises(ValueError, match="not a number from 0 to 1"):
        METHODS["self-guidance"].options[0].parse("-0.1")
