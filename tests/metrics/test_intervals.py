"""The interval beside each value: it predicts how values vary over other images."""

import numpy as np
import pytest
import torch

from edm2kit.metrics.frechet import frechet_distance, frechet_influence
from edm2kit.metrics.moments import FeatureStatistics
from edm2kit.metrics.score import Score
from edm2kit.metrics.scoring import poisson_intervals


def rows_of(seed, count=400, features=6, scale=1.2):
    return np.random.default_rng(seed).normal(0.2, scale, (count, features))


def statistics(rows, weights=None):
    covariance = np.cov(rows, rowvar=False, aweights=weights)
    return FeatureStatistics(np.average(rows, axis=0, weights=weights), covariance, "")


REFERENCE = FeatureStatistics(np.zeros(6), np.diag([1, 2, 0.5, 1, 1, 3.0]), "")


def distance(found, reference=REFERENCE):
    return frechet_distance(found.mean, found.covariance, reference.mean, reference.covariance)


def test_the_influence_of_an_image_is_the_derivative_by_its_weight():
    rows = rows_of(0)
    influence = frechet_influence(torch.from_numpy(rows), statistics(rows), REFERENCE)
    assert float(influence.mean()) == pytest.approx(0, abs=1e-12)
    step = 1e-4
    for image in (0, 7, 399):
        weights = np.ones(400)
        weights[image] += step

        # a covariance with weights is divided by something else than n - 1: compare those divided by the sum
        def biased(w):
            mean = np.average(rows, axis=0, weights=w)
            return FeatureStatistics(mean, np.cov(rows, rowvar=False, aweights=w, ddof=0), "")

        numeric = (distance(biased(weights)) - distance(biased(np.ones(400)))) / step * 400
        assert float(influence[image]) == pytest.approx(numeric, rel=0.02, abs=0.02)


def test_the_influence_exists_for_fewer_images_than_features():
    rows = rows_of(1, count=5)
    influence = frechet_influence(torch.from_numpy(rows), statistics(rows), REFERENCE)
    assert influence.isfinite().all()
    singular = FeatureStatistics(np.zeros(6), np.diag([1, 1, 1, 0, 0, 0.0]), "")
    assert frechet_influence(torch.from_numpy(rows), statistics(rows), singular).isfinite().all()


def test_an_interval_has_the_width_of_the_spread_over_other_images():
    values, widths = [], []
    for seed in range(80):
        rows = rows_of(seed)
        found = statistics(rows)
        score = Score(distance(found), frechet_influence(torch.from_numpy(rows), found, REFERENCE))
        low, high = poisson_intervals({"fid": score}, 400)["fid"]
        assert low < score.value < high
        values.append(score.value)
        widths.append(high - low)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(values, ddof=1), rel=0.25)


def test_the_interval_of_a_mean_is_the_usual_one():
    contributions = torch.from_numpy(np.random.default_rng(0).random(2000) < 0.3)
    low, high = poisson_intervals({"x": Score.mean_of(contributions)}, 2000)["x"]
    p = float(contributions.double().mean())
    expected = 1.96 * np.sqrt(p * (1 - p) / 2000)
    assert (p - low, high - p) == pytest.approx((expected, expected), rel=0.1)


def test_the_variance_of_random_subsets_counts():
    (ends,) = poisson_intervals({"x": Score(1.0, extra_variance=4.0)}, 4000).values()
    assert ends == pytest.approx((1 - 3.92, 1 + 3.92), rel=0.1)
    assert poisson_intervals({"x": Score(1.0)}, 100) == {}


def test_intervals_repeat():
    score = Score.mean_of(torch.arange(50))
    assert poisson_intervals({"x": score}, 100) == poisson_intervals({"x": score}, 100)
