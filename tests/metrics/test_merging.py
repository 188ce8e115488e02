"""Statistics measured apart join to those of all images."""

import numpy as np
import pytest

from edm2kit.metrics.merging import merge_statistics
from edm2kit.metrics.reference import FeatureStatistics


def statistics(rows: np.ndarray, fingerprint: str = "x") -> tuple[int, FeatureStatistics]:
    return len(rows), FeatureStatistics(rows.mean(axis=0), np.cov(rows, rowvar=False), fingerprint)


@pytest.mark.parametrize("cut", [2, 7, 28])
def test_two_parts_join_to_the_whole(cut):
    rows = np.random.default_rng(0).normal(size=(30, 5)) + np.arange(30)[:, None] * 3
    count, joined = merge_statistics(*statistics(rows[:cut]), *statistics(rows[cut:]))
    _, whole = statistics(rows)
    assert count == 30
    np.testing.assert_allclose(joined.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(joined.covariance, whole.covariance, rtol=1e-12)
    assert joined.fingerprint == "x"


def test_features_of_two_detectors_do_not_join():
    rows = np.eye(3)
    with pytest.raises(ValueError, match="two detectors"):
        merge_statistics(*statistics(rows), *statistics(rows, "y"))
