"""Streaming moments against numpy, whatever the batches."""

import numpy as np
import pytest
import torch

from edm2kit.metrics.moments import FeatureStatistics, Moments, merge_statistics, sum_over_ranks_


def features(count, size, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32))


@pytest.mark.parametrize("size", [1, 7, 256, 300], ids=lambda size: f"{size} features")
@pytest.mark.parametrize("batch", [1, 50, 1024, 3000], ids=lambda batch: f"batch {batch}")
def test_equal_numpy_for_any_batch(size, batch):
    rows = features(2500 if batch > 1 else 40, size) + 3
    moments = Moments(size)
    for part in rows.split(batch):
        moments.add(part)
    count, mean, covariance = moments.mean_and_covariance()
    assert count == len(rows)
    assert mean.dtype == covariance.dtype == np.float64
    exact = rows.double().numpy()
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(covariance, np.cov(exact, rowvar=False).reshape(size, size), atol=1e-12)
    assert (covariance == covariance.T).all()


def test_can_be_read_and_go_on():
    rows, moments = features(30, 4), Moments(4)
    moments.add(rows[:10])
    assert moments.mean_and_covariance()[0] == 10
    moments.add(rows[10:])
    np.testing.assert_allclose(moments.mean_and_covariance()[2], np.cov(rows.double().numpy(), rowvar=False))


@pytest.mark.parametrize("mean_in_stds", [1, 100, 10000])
def test_a_large_mean_costs_little(mean_in_stds):
    rows, moments = features(5000, 3) + mean_in_stds, Moments(3)
    moments.add(rows)
    exact = np.cov(rows.double().numpy(), rowvar=False)
    np.testing.assert_allclose(moments.mean_and_covariance()[2], exact, rtol=0, atol=2e-14 * mean_in_stds**2)


def test_on_one_rank_the_sum_over_ranks_changes_nothing():
    several = [Moments(3), Moments(5)]
    for moments in several:
        moments.add(features(20, moments.num_features))
    before = [moments.mean_and_covariance() for moments in several]
    sum_over_ranks_(several)
    for moments, (count, mean, covariance) in zip(several, before, strict=True):
        again = moments.mean_and_covariance()
        assert again[0] == count
        assert (again[1] == mean).all()
        assert (again[2] == covariance).all()


@pytest.mark.parametrize("count", [0, 1])
def test_refuses_fewer_than_two_rows(count):
    moments = Moments(3)
    moments.add(features(count, 3))
    with pytest.raises(ValueError, match=f"at least 2 images; got {count}"):
        moments.mean_and_covariance()


def test_refuses_another_width_and_nan():
    moments = Moments(3)
    with pytest.raises(ValueError, match=r"\[N, 3\]"):
        moments.add(features(5, 4))
    moments.add(torch.full((5, 3), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        moments.mean_and_covariance()


def statistics(rows: np.ndarray, fingerprint: str = "x") -> tuple[int, FeatureStatistics]:
    return len(rows), FeatureStatistics(rows.mean(axis=0), np.cov(rows, rowvar=False), fingerprint)


@pytest.mark.parametrize("cut", [2, 7, 28])
def test_merged_parts_equal_the_whole(cut):
    rows = np.random.default_rng(0).normal(size=(30, 5)) + np.arange(30)[:, None] * 3
    count, joined = merge_statistics(*statistics(rows[:cut]), *statistics(rows[cut:]))
    _, whole = statistics(rows)
    assert count == 30
    np.testing.assert_allclose(joined.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(joined.covariance, whole.covariance, rtol=1e-12)
    assert joined.fingerprint == "x"


def test_features_of_different_detectors_are_not_merged():
    rows = np.eye(3)
    with pytest.raises(ValueError, match="different detectors"):
        merge_statistics(*statistics(rows), *statistics(rows, "y"))
