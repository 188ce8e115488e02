"""The Frechet distance: golden values, closed forms, singular covariances, refused input."""

import numpy as np
import pytest
import torch

from edm2kit.metrics.frechet import _trace_sqrt_regular, frechet_distance, growing_distances
from edm2kit.metrics.moments import FeatureStatistics
from tests.support.golden import DATA


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "metrics.npz") as arrays:
        return dict(arrays)


def gaussian(features):
    return features.mean(axis=0), np.cov(features, rowvar=False)


def samples(seed, count, size):
    """Correlated features of very different scales."""
    random = np.random.default_rng(seed)
    return random.normal(size=(count, size)) @ (random.normal(size=(size, size)) * np.logspace(0, -2, size))


def test_golden_value(golden):
    value = frechet_distance(golden["mu_a"], golden["sigma_a"], golden["mu_b"], golden["sigma_b"])
    assert value == pytest.approx(float(golden["frechet"]), rel=1e-6)


def test_golden_value_of_a_singular_covariance(golden):
    few = gaussian(golden["features_a"][:10].astype(np.float64))
    value = frechet_distance(*few, golden["mu_b"], golden["sigma_b"])
    assert value == pytest.approx(float(golden["frechet_rank_deficient_first10_of_a_vs_b"]), rel=1e-3)


def test_diagonal_gaussians_in_closed_form():
    mu1, mu2, std1, std2 = np.random.default_rng(0).uniform(0, 3, (4, 20))
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((std1 - std2) ** 2)
    assert frechet_distance(mu1, np.diag(std1**2), mu2, np.diag(std2**2)) == pytest.approx(expected, rel=1e-12)


def test_commuting_gaussians_in_closed_form():
    """In any basis: covariances with common eigenvectors, eigenvalues over twelve decades."""
    random = np.random.default_rng(1)
    basis = np.linalg.qr(random.normal(size=(30, 30)))[0]
    std1, std2 = np.logspace(0, -6, 30), random.permutation(np.logspace(1, -6, 30))
    value = frechet_distance(np.zeros(30), (basis * std1**2) @ basis.T, np.zeros(30), (basis * std2**2) @ basis.T)
    assert value == pytest.approx(np.sum((std1 - std2) ** 2), rel=1e-7)


@pytest.mark.parametrize(
    ("count1", "count2"), [(300, 200), (20, 300), (20, 30), (2, 2)], ids=["regular", "one", "both", "two samples"]
)
def test_is_symmetric_and_zero_for_equals(count1, count2):
    first, second = gaussian(samples(0, count1, 60)), gaussian(samples(1, count2, 60))
    there, back = frechet_distance(*first, *second), frechet_distance(*second, *first)
    assert 0 < there < np.inf
    assert there == pytest.approx(back, rel=1e-9)
    for one in (first, second):
        assert frechet_distance(*one, *one) <= 1e-9 * np.trace(one[1])


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0, 3.0])
def test_the_quick_route_is_taken_only_where_it_is_exact(decay):
    """Common eigenvectors, spectra that fall as features' do: tr (S1 S2)^(1/2) is known."""
    random = np.random.default_rng(5)
    basis = np.linalg.qr(random.normal(size=(400, 400)))[0]
    first, second = np.arange(1, 401.0) ** -decay * random.uniform(0.5, 2, (2, 400))
    covariances = [(basis * spectrum) @ basis.T for spectrum in (first, second)]
    traces = first.sum() + second.sum()
    root = _trace_sqrt_regular(*covariances, max_error=1e-9 * traces)
    assert (root is not None) == (decay < 3)
    if root is not None:
        assert root == pytest.approx(np.sqrt(first * second).sum(), abs=1e-12 * traces)


def test_singular_covariances_in_closed_form():
    """Two Gaussians on lines at an angle: tr (S1 S2)^(1/2) is s1 s2 |cos|."""
    line1, line2 = np.zeros((2, 50))
    line1[0], line2[:2] = 2, [3 * np.cos(0.4), 3 * np.sin(0.4)]
    value = frechet_distance(np.zeros(50), np.outer(line1, line1), np.zeros(50), np.outer(line2, line2))
    assert value == pytest.approx(4 + 9 - 2 * 6 * np.cos(0.4), rel=1e-12)


def test_points_have_no_covariance():
    zero = np.zeros((3, 3))
    assert frechet_distance([0, 0, 0], zero, [1, 2, 2], zero) == 9
    assert frechet_distance([0, 0, 0], zero, [0, 0, 0], np.eye(3)) == pytest.approx(3)


def test_a_nearly_singular_covariance_is_as_exact_as_a_singular_one():
    """Cholesky may or may not survive rounding; the answer must not depend on it."""
    features = samples(2, 40, 60)
    mean, covariance = gaussian(features)
    other = gaussian(samples(3, 300, 60))
    value = frechet_distance(mean, covariance, *other)
    for size in (1e-17, 1e-16, 1e-15):
        nudged = covariance + size * np.trace(covariance) * np.eye(60)
        assert frechet_distance(mean, nudged, *other) == pytest.approx(value, rel=1e-5)


def spoil(array, value):
    array = array.copy()
    array[..., -1] = value
    return array


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda mu, sigma: (spoil(mu, np.nan), sigma), "not finite"),
        (lambda mu, sigma: (mu, spoil(sigma, np.inf)), "not finite"),
        (lambda mu, sigma: (mu[:-1], sigma), "shape"),
        (lambda mu, sigma: (mu[None], sigma), "shape"),
        (lambda mu, sigma: (mu[:-1], sigma[:-1, :-1]), "equal numbers"),
        (lambda mu, sigma: (mu, spoil(sigma, 7)), "not symmetric"),
        (lambda mu, sigma: (mu, sigma - 9 * np.eye(len(mu))), "negative eigenvalue"),
    ],
)
@pytest.mark.parametrize("swap", [False, True])
def test_refuses(change, reason, swap):
    good = gaussian(np.random.default_rng(4).normal(size=(100, 5)))
    pair = (change(*good), good)
    first, second = reversed(pair) if swap else pair
    with pytest.raises(ValueError, match=reason):
        frechet_distance(*first, *second)


@pytest.mark.parametrize(("features", "reference_rows"), [(6, 200), (40, 200), (6, 4)], ids=["regular", "few", "flat"])
def test_distances_of_growing_sets_are_those_of_each_set(features, reference_rows):
    # "few": fewer images than features; "flat": a reference without full rank
    rng = np.random.default_rng(0)
    x, y = rng.normal(2, 1, (90, features)).astype(np.float32), rng.normal(1, 2, (reference_rows, features))
    reference = FeatureStatistics(y.mean(axis=0), np.cov(y, rowvar=False), "")
    sizes = [30, 31, 90]
    found = growing_distances(torch.from_numpy(x), sizes, reference)
    parts = [x[:size].astype(np.float64) for size in sizes]
    expected = [
        frechet_distance(part.mean(axis=0), np.cov(part, rowvar=False), reference.mean, reference.covariance)
        for part in parts
    ]
    assert found == pytest.approx(expected, rel=1e-9)
