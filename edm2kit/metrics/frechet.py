"""The Frechet distance between two Gaussians: fast, symmetric, and exact for singular covariances."""

from collections.abc import Sequence

import numpy as np
import scipy.linalg
import torch
from numpy.typing import ArrayLike
from scipy.linalg import blas, lapack

from edm2kit.metrics.moments import FeatureStatistics, add_outer_, gram_matrix, row_products

# The fast path is used if its expected rounding error is below this fraction of tr S1 + tr S2, ...
_FAST_PATH_ERROR = 1e-9
# ... with the estimate of the error multiplied by this margin (in 56 pairs of covariances within the limit, the error
# never exceeded a fifth of the estimate, wherever that was above 1e-15 of the traces), ...
_MARGIN = 10
# ... and if every eigenvalue is at least this many times the rounding error of the largest; the estimate fails below.
_MIN_EIGENVALUE_IN_ERRORS = 500
_TILE = 256
_INFLUENCE_ROWS = 2048
_MAX_STRETCH = 1e4


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """The squared Frechet (2-Wasserstein) distance between N(mu1, sigma1) and N(mu2, sigma2), in float64.

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Means are [F] and covariances [F, F], arrays or CPU tensors.
    Singular covariances (fewer samples than features) are exact up to rounding. Raises ValueError for other shapes,
    values that are not finite, and matrices that are not covariances. Dowson and Landau 1982; Heusel et al. 2017
    (arXiv 1706.08500).

    Example: `frechet_distance([0, 0], np.eye(2), [3, 4], np.eye(2))` returns 25.0.
    """
    mean1, cov1 = _checked(mu1, sigma1, "first")
    mean2, cov2 = _checked(mu2, sigma2, "second")
    if mean1.shape != mean2.shape:
        raise ValueError(f"the distributions have {len(mean1)} and {len(mean2)} features; expected equal numbers")
    traces = np.trace(cov1) + np.trace(cov2)
    root = _trace_sqrt_regular(cov1, cov2, _FAST_PATH_ERROR * traces)
    if root is None:
        root = _trace_sqrt_singular(cov1, cov2)
    # rounding can turn a distance of zero into a small negative number
    return max(float(np.sum((mean1 - mean2) ** 2) + traces - 2 * root), 0.0)


def growing_distances(rows: torch.Tensor, sizes: Sequence[int], reference: FeatureStatistics) -> list[float]:
    """The distances of the first n of `rows` [N, F] from the reference, for each n of increasing `sizes`.

    As from `frechet_distance`, for two thirds of its time: the covariance L L^T of the reference is factored once, and
    the eigenvalues of L^T S L are those of the covariance of the rows times L.
    """
    lower, failed = lapack.dpotrf(reference.covariance.T, lower=1)
    shift = rows.mean(dim=0, dtype=torch.float64)
    rows = rows.double() - shift
    transformed = _times_lower(rows, lower)
    outer = torch.zeros(len(shift), len(shift), dtype=torch.float64, device=rows.device)
    total, total_transformed, squares = (torch.zeros_like(shift) for _ in range(3))
    distances, start = [], 0
    for size in sizes:
        part = slice(start, size)
        start = size
        add_outer_(outer, transformed[part])
        total += rows[part].sum(dim=0)
        total_transformed += transformed[part].sum(dim=0)
        squares += rows[part].square().sum(dim=0)
        product = torch.addr(outer, total_transformed, total_transformed, alpha=-1 / size).div_(size - 1)
        difference = (total / size + shift).cpu().numpy() - reference.mean
        traces = float((squares - total.square() / size).sum()) / (size - 1) + float(np.trace(reference.covariance))
        # the upper triangle is the lower one of the transpose
        root = None if failed else _sum_of_roots(product.cpu().numpy().T, _FAST_PATH_ERROR * traces)
        if root is None:
            own = rows[:size]
            covariance = gram_matrix(own - own.mean(dim=0)).cpu().numpy() / (size - 1)
            mean = (own.mean(dim=0) + shift).cpu().numpy()
            distances.append(frechet_distance(mean, covariance, reference.mean, reference.covariance))
        else:
            distances.append(max(float(difference @ difference) + traces - 2 * root, 0.0))
    return distances


def _times_lower(rows: torch.Tensor, lower: np.ndarray) -> torch.Tensor:
    """`rows` [N, F] times a lower triangular matrix; on a CPU for half of the cost of a product."""
    if rows.device.type != "cpu":
        return rows @ torch.from_numpy(lower).to(rows.device)
    return torch.from_numpy(blas.dtrmm(1.0, lower, rows.numpy().T, lower=1, trans_a=1).T)


def frechet_influence(
    features: torch.Tensor, statistics: FeatureStatistics, reference: FeatureStatistics
) -> torch.Tensor:
    """How the squared distance changes, to first order, with the weight of each image, times their number: [N] float64.

    `features` [N, F] have the given `statistics`; the reference does not change. With T, the map that transports one
    Gaussian to the other, an image x at d = x - mu1 has the effect 2 d (mu1 - mu2) + d^T (I - T) d; the mean over all
    images is subtracted.
    """
    root = _square_root(reference.covariance)
    values, vectors = scipy.linalg.eigh(root.T @ statistics.covariance @ root, check_finite=False, driver="evd")
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
    # T = B (B^T S B)^(-1/2) B^T = C C^T, with the reference's covariance B B^T
    factor = torch.from_numpy(root @ (vectors[:, kept] * values[kept] ** -0.25)).T.contiguous()
    # float32 is enough for an interval, unless T stretches some direction very much
    if len(factor) == 0 or float(factor.square().sum(dim=1).max()) < _MAX_STRETCH:
        factor = factor.float()
    shift = torch.from_numpy(2 * (statistics.mean - reference.mean))
    effects = []
    for rows in features.split(_INFLUENCE_ROWS):
        d = rows.cpu().double() - torch.from_numpy(statistics.mean)
        transported = row_products(d.to(factor.dtype), factor).square_().sum(dim=1, dtype=torch.float64)
        effects.append(d @ shift + d.square().sum(dim=1) - transported)
    effect = torch.cat(effects)
    return effect - effect.mean()


def _checked(mu: ArrayLike, sigma: ArrayLike, which: str) -> tuple[np.ndarray, np.ndarray]:
    mean, cov = np.asarray(mu, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    if mean.ndim != 1 or len(mean) == 0 or cov.shape != (len(mean), len(mean)):
        raise ValueError(
            f"the {which} distribution has a mean of shape {mean.shape} and a covariance of shape {cov.shape}; "
            "expected [F] and [F, F]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"the {which} distribution has values that are not finite (NaN or infinity)")
    if _asymmetry(cov) > 1e-6 * max(cov.max(), -cov.min()):
        raise ValueError(f"the covariance of the {which} distribution is not symmetric")
    return mean, cov


def _asymmetry(sigma: np.ndarray) -> float:
    """The largest difference between an entry and its mirror image."""
    largest = 0.0
    # tile by tile, since reading a large matrix by columns is slow
    for a in range(0, len(sigma), _TILE):
        for b in range(a, len(sigma), _TILE):
            difference = sigma[a : a + _TILE, b : b + _TILE] - sigma[b : b + _TILE, a : a + _TILE].T
            largest = max(largest, float(np.abs(difference).max()))
    return largest


def _trace_sqrt_regular(sigma1: np.ndarray, sigma2: np.ndarray, max_error: float) -> float | None:
    """The trace of (S1 S2)^(1/2) from the eigenvalues of L^T S2 L, with S1 = L L^T; None if not exact enough.

    An eigenvalue has an error of about `noise`, its root one of noise / (2 root). The errors have random signs.
    """
    # LAPACK wants columns first: the transpose of a symmetric matrix is the same matrix, without a copy
    lower, failed = lapack.dpotrf(sigma1.T, lower=1, clean=0)
    if failed:
        return None
    product, _ = lapack.dsygst(sigma2.T, lower, itype=2, lower=1)
    return _sum_of_roots(product, max_error)


def _sum_of_roots(product: np.ndarray, max_error: float) -> float | None:
    """The sum of the roots of the eigenvalues, from the lower triangle, which is overwritten; None if not exact."""
    eigenvalues = scipy.linalg.eigh(
        product, lower=True, eigvals_only=True, overwrite_a=True, check_finite=False, driver="evd"
    )
    noise = np.finfo(np.float64).eps * np.abs(eigenvalues).max() + np.finfo(np.float64).tiny
    if eigenvalues.min() < _MIN_EIGENVALUE_IN_ERRORS * noise:
        return None
    roots = np.sqrt(eigenvalues)
    if _MARGIN * np.linalg.norm(noise / (2 * roots)) > max_error:
        return None
    return float(roots.sum())


def _trace_sqrt_singular(sigma1: np.ndarray, sigma2: np.ndarray) -> float:
    """The trace of (S1 S2)^(1/2) as the sum of singular values of B1^T B2, with S = B B^T and B of full rank."""
    # unlike eigenvalues of a product, singular values need no square root, which would turn 1e-16 into 1e-8
    product = _square_root(sigma1).T @ _square_root(sigma2)
    return float(scipy.linalg.svdvals(product).sum()) if product.size else 0.0


def _square_root(sigma: np.ndarray) -> np.ndarray:
    """B [F, rank] with B B^T = sigma. Raises ValueError if sigma is not positive semidefinite."""
    rounding = len(sigma) * np.finfo(np.float64).eps
    lower, failed = lapack.dpotrf(sigma.T, lower=1)
    if not failed and lower.diagonal().min() ** 2 > rounding * lower.diagonal().max() ** 2:
        return lower
    values, vectors = scipy.linalg.eigh(sigma, check_finite=False, driver="evd")
    largest = np.abs(values).max()
    if values[0] < -1e-6 * largest:
        raise ValueError(f"a covariance has the negative eigenvalue {values[0]:g}; it is corrupt")
    kept = values > rounding * largest
    return vectors[:, kept] * np.sqrt(values[kept])
