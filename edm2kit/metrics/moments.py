"""Mean and covariance of features, in float64: accumulated batch by batch, summed over ranks, merged."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edm2kit.torch_utils import dist

_BUFFER_ROWS = 1024  # large matrix products are several times faster than one per batch
_BLOCK_COLUMNS = 256  # the sum of outer products is symmetric: only blocks on and above the diagonal are computed


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean [F] and covariance [F, F] of one detector's features, float64.

    `fingerprint` identifies the detector; None in published files, which do not name it.
    """

    mean: np.ndarray
    covariance: np.ndarray
    fingerprint: str | None


def merge_statistics(n: int, a: FeatureStatistics, m: int, b: FeatureStatistics) -> tuple[int, FeatureStatistics]:
    """Count and statistics of `n` images with statistics `a` and `m` other images with statistics `b`.

    As exact as one pass over all images (Chan et al. 1979). Raises ValueError for features of different detectors.
    """
    if a.fingerprint != b.fingerprint:
        raise ValueError(f"statistics of different detectors cannot be merged: {a.fingerprint}; {b.fingerprint}")
    total = n + m
    difference = b.mean - a.mean
    scatter = (n - 1) * a.covariance + (m - 1) * b.covariance + np.outer(difference, difference) * (n * m / total)
    return total, FeatureStatistics(a.mean + difference * (m / total), scatter / (total - 1), a.fingerprint)


class Moments:
    """Running count, sum and sum of outer products of float32 feature rows, on one device and this rank.

    The sums are about zero, not about the mean, so that one all-reduce can add them up. A mean of k standard deviations
    costs the covariance a relative error of k^2 * 1e-14; features of images have k below 100.

    Example: `moments = Moments(236); moments.add(detector(images)); count, mean, cov = moments.mean_and_covariance()`
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        self.num_features = num_features
        # mps has no float64
        self._device = torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)
        self._count = 0
        self._sum = torch.zeros(num_features, dtype=torch.float64, device=self._device)
        self._outer = torch.zeros(num_features, num_features, dtype=torch.float64, device=self._device)
        self._buffer = torch.empty(_BUFFER_ROWS, num_features, dtype=torch.float64, device=self._device)
        self._buffered_rows = 0

    def add(self, features: torch.Tensor) -> None:
        """Add rows, float32 [N, F]; N may be 0. Raises ValueError for another shape."""
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(f"features have shape {list(features.shape)}; expected [N, {self.num_features}]")
        for part in features.detach().to(self._device).split(_BUFFER_ROWS):
            if self._buffered_rows + len(part) > _BUFFER_ROWS:
                self._flush()
            self._buffer[self._buffered_rows : self._buffered_rows + len(part)] = part
            self._buffered_rows += len(part)

    def _flush(self) -> None:
        if self._buffered_rows == 0:
            return
        rows, self._buffered_rows = self._buffer[: self._buffered_rows], 0
        self._count += len(rows)
        self._sum += rows.sum(dim=0)
        for start in range(0, self.num_features, _BLOCK_COLUMNS):
            block = slice(start, start + _BLOCK_COLUMNS)
            self._outer[block, start:].addmm_(rows[:, block].T, rows[:, start:])

    def mean_and_covariance(self) -> tuple[int, np.ndarray, np.ndarray]:
        """The number of rows, the mean [F] and the covariance [F, F] (divided by n - 1), float64.

        Raises ValueError for fewer than two rows and for features that are not finite.
        """
        self._flush()
        if self._count < 2:
            raise ValueError(f"a covariance needs at least 2 images; got {self._count}")
        if not torch.isfinite(self._sum).all():
            raise ValueError("the detector returned features that are not finite (NaN or infinity)")
        mean = self._sum / self._count
        upper = (self._outer - torch.outer(self._sum, mean)).triu() / (self._count - 1)
        covariance = upper + upper.triu(1).T
        return self._count, mean.cpu().numpy(), covariance.cpu().numpy()


def sum_over_ranks_(moments: Sequence[Moments]) -> None:
    """Replace each of `moments` with the moments of all ranks' rows, in one all-reduce; a rank may have no rows."""
    for one in moments:
        one._flush()
    counts = torch.tensor([one._count for one in moments], dtype=torch.float64, device=moments[0]._device)
    sums = [part.flatten() for one in moments for part in (one._sum, one._outer)]
    packed = dist.all_reduce_sum_(torch.cat([counts, *sums]))
    position = len(moments)
    for one, count in zip(moments, packed[:position].tolist(), strict=True):
        one._count = int(count)
        for part in (one._sum, one._outer):
            part.copy_(packed[position : position + part.numel()].view_as(part))
            position += part.numel()
