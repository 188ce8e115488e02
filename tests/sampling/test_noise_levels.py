"""Noise levels against Equation 5 of EDM."""

import math

import pytest
import torch

from edm2kit.sampling.noise_levels import karras_sigmas


def test_the_schedule_is_equation_5_of_edm():
    sigmas = karras_sigmas(32, 0.002, 80, 7, torch.float64)
    for i in (0, 1, 15, 22, 31):
        expected = (80 ** (1 / 7) + i / 31 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert sigmas[i].item() == pytest.approx(expected, rel=1e-12)
    assert len(sigmas) == 33
    assert sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())


def test_one_step_goes_from_the_top_to_zero():
    assert karras_sigmas(1, 0.002, 80, 7, torch.float64).tolist() == pytest.approx([80, 0])


def test_float32_is_float64_rounded():
    exact = karras_sigmas(18, 0.01, 20, 5, torch.float64)
    assert torch.equal(karras_sigmas(18, 0.01, 20, 5), exact.float())


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ((0, 0.002, 80, 7), "steps is 0"),
        ((8, 0, 80, 7), "sigma_min is 0"),
        ((8, 80, 0.002, 7), "sigma_max 0.002"),
        ((8, 0.002, math.inf, 7), "sigma_max inf"),
        ((8, math.nan, 80, 7), "sigma_min is nan"),
        ((8, 0.002, 80, 0), "rho is 0"),
        ((8, 0.002, 80, math.nan), "rho is nan"),
    ],
)
def test_a_schedule_that_does_not_fall_is_refused(settings, wrong):
    with pytest.raises(ValueError, match=wrong):
        karras_sigmas(*settings)
