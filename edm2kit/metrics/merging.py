"""Joining the statistics of images that were measured apart."""

import numpy as np

from edm2kit.metrics.reference import FeatureStatistics


def merge_statistics(n: int, a: FeatureStatistics, m: int, b: FeatureStatistics) -> tuple[int, FeatureStatistics]:
    """Count and statistics of `n` images that have `a` and `m` others that have `b`.

    As exact as one pass over all of them (Chan et al. 1979). Raises ValueError for features of different detectors.
    """
    if a.fingerprint != b.fingerprint:
        raise ValueError(f"statistics of two detectors cannot be joined: {a.fingerprint}; {b.fingerprint}")
    total, difference = n + m, b.mean - a.mean
    scatter = (n - 1) * a.covariance + (m - 1) * b.covariance + np.outer(difference, difference) * (n * m / total)
    return total, FeatureStatistics(a.mean + difference * (m / total), scatter / (total - 1), a.fingerprint)
