"""Power-function profiles: reference values, integrals, and reconstruction of known profiles."""

import math

import numpy as np
import pytest

from edm2kit.ema.power_function import (
    exp_to_std,
    power_function_beta,
    profile_fit,
    profile_inner_product,
    solve_posthoc_coefficients,
    std_to_exp,
)
from tests.support import golden


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in golden.load("phema.npz").items()}


def test_exponents_and_betas_equal_reference(reference):
    np.testing.assert_allclose(std_to_exp(reference["std"]), reference["exp"], rtol=1e-8)
    np.testing.assert_allclose(exp_to_std(reference["exp_to_std_in"]), reference["exp_to_std"], rtol=1e-8)
    betas = [power_function_beta(*row) for row in reference["beta_in"]]
    np.testing.assert_allclose(betas, reference["beta"], rtol=1e-8)


def test_coefficients_equal_reference(reference):
    coefficients = solve_posthoc_coefficients(
        reference["in_nimg"], reference["in_std"], reference["out_nimg"], reference["out_std"]
    )
    error = np.abs(coefficients - reference["coefs"]).max(axis=0) / np.abs(reference["coefs"]).max(axis=0)
    assert error.max() < 1e-8
    np.testing.assert_allclose(coefficients.sum(axis=0), 1)


@pytest.mark.parametrize("std", [0, -0.1, 0.2887, 0.29, float("nan")])
def test_impossible_lengths_are_refused(std):
    with pytest.raises(ValueError, match=r"at most 0\.2886"):
        std_to_exp(std)


def test_stored_profile_reconstructs_itself_and_later_snapshots_take_no_part():
    times, stds = np.repeat([1e6, 2e6, 3e6, 4e6], 2), np.tile([0.05, 0.1], 4)
    coefficients = solve_posthoc_coefficients(times, stds, 3e6, [0.1, 0.15])
    expected = np.zeros(8)
    expected[5] = 1
    np.testing.assert_allclose(coefficients[:, 0], expected, atol=1e-9)
    assert np.all(coefficients[6:] == 0)
    assert np.all(coefficients[:6, 1] != 0)
    with pytest.raises(ValueError, match="no snapshot at or before 5"):
        solve_posthoc_coefficients(times, stds, 5, [0.1])


def test_inner_product_equals_numerical_integral():
    t = (np.arange(2_000_000) + 0.5) / 2_000_000 * 3
    for t_a, exp_a, t_b, exp_b in [(1.0, 7.0, 3.0, 17.0), (3.0, 7.0, 1.5, 2.0), (2.0, 5.0, 2.0, 5.0)]:
        a, b = ((e + 1) * t**e / end ** (e + 1) * (t <= end) for end, e in ((t_a, exp_a), (t_b, exp_b)))
        integral = (a * b).sum() * 3 / len(t)
        result = profile_inner_product(*(np.array(v) for v in (t_a, exp_a, t_b, exp_b)))
        assert float(result) == pytest.approx(integral, rel=1e-5)


def test_the_fit_of_a_rebuilt_profile_is_that_of_the_curves_themselves():
    """Against sums over a fine grid: distance of the curves, and spread of the sum of them."""
    ofs, stds, coefficients = np.array([0.5, 1.0, 1.0]), np.array([0.05, 0.05, 0.1]), np.array([0.2, -0.3, 1.1])
    grid = (np.arange(400_000) + 0.5) / 400_000

    def curve(end: float, std: float) -> np.ndarray:
        exp = std_to_exp(std)
        return np.where(grid < end, (exp + 1) * (grid / end) ** exp / end, 0)

    ours = sum(c * curve(end, std) for c, end, std in zip(coefficients, ofs, stds, strict=True))
    wanted = curve(1.0, 0.12)
    error, width = profile_fit(coefficients, ofs, stds, 1.0, 0.12)
    assert error == pytest.approx(math.sqrt(((ours - wanted) ** 2).mean() / (wanted**2).mean()), rel=1e-4)
    mean = (ours * grid).mean()
    assert width == pytest.approx(math.sqrt((ours * grid**2).mean() - mean**2), rel=1e-4)
    assert profile_fit(np.array([1.0]), ofs[1:2], stds[2:], 1.0, 0.1) == (0, pytest.approx(0.1, rel=1e-6))
    assert profile_fit(np.array([-1.0]), ofs[1:2], stds[2:], 1.0, 0.1)[1] is None
