"""Features of images: kept, or reduced to mean and covariance in float64, batch by batch and over all ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edm2kit.metrics.detectors.registry import Detector, detect
from edm2kit.torch_utils import dist

_BUFFER_ROWS = 1024  # large matrix products are several times faster than one per batch
GRAM_ROWS = 4096
_BLOCK_COLUMNS = 256  # the sum of outer products is symmetric: only blocks on and above the diagonal are computed


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean [F] and covariance [F, F] of one detector's features, float64.

    `fingerprint` identifies the detector; None in published files, which do not name it.
    """

    mean: np.ndarray
    covariance: np.ndarray
    fingerprint: str | None

    def __repr__(self) -> str:
        return f"FeatureStatistics: mean and covariance of {len(self.mean)} features"


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
        rest = features.detach().to(self._device)
        while len(rest) > 0:
            # the buffer is filled to the last row, so that the sums do not depend on the batches
            part, rest = rest[: _BUFFER_ROWS - self._buffered_rows], rest[_BUFFER_ROWS - self._buffered_rows :]
            self._buffer[self._buffered_rows : self._buffered_rows + len(part)] = part
            self._buffered_rows += len(part)
            if self._buffered_rows == _BUFFER_ROWS:
                self._flush()

    def _flush(self) -> None:
        if self._buffered_rows == 0:
            return
        rows, self._buffered_rows = self._buffer[: self._buffered_rows], 0
        self._count += len(rows)
        self._sum += rows.sum(dim=0)
        add_outer_(self._outer, rows)

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


def add_outer_(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add X^T X of `rows` X [N, F] to the upper triangle of `total` [F, F]; below it, values have no meaning."""
    for start in range(0, len(total), _BLOCK_COLUMNS):
        block = slice(start, start + _BLOCK_COLUMNS)
        total[block, start:].addmm_(rows[:, block].T, rows[:, start:])


def gram_matrix(rows: torch.Tensor, prepare: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
    """X^T X of `rows` X [N, F], float64: [F, F], for little more than half the cost of the product.

    With `prepare`, X is what it makes of the rows, some at a time, so that X never takes memory for all of them.
    """
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in rows.split(GRAM_ROWS):
        add_outer_(total, part if prepare is None else prepare(part))
    return total.triu() + total.triu(1).T


def product_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which many products are computed if their errors must be those of float32 at most."""
    # by settings, TF32 or bfloat16 may stand for float32
    is_float32 = device.type == "cpu" and torch.get_float32_matmul_precision() == "highest" and _has_float32_errors()
    return torch.float32 if is_float32 else torch.float64


def _has_float32_errors() -> bool:
    """Whether float32 products are as exact as they should be, whatever settings and environment variables say."""
    x = torch.linspace(1, 2, 64 * 64).view(64, 64)
    exact = x.double() @ x.double().T
    bound = 64 * torch.finfo(torch.float32).eps / 2 * exact
    return bool(((row_products(x, x).double() - exact).abs() <= bound).all())


def row_products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x y^T of rows x [N, F] and y [M, F]: [N, M].

    On a CPU, float32 goes to oneDNN, which is twice as fast on AMD processors with AVX-512 as what `@` uses.
    """
    is_float32 = x.device.type == "cpu" and x.dtype == torch.float32
    # not part of PyTorch's documented functions; without it, only the time differs
    if is_float32 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), y.contiguous(), None, "none", [], "")
    return x @ y.T


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


class FeaturePass:
    """Runs images through detectors: their moments on this rank, or, with `keep`, the features themselves.

    Kept features need 400 MB for 50,000 images of Inception; detectors that share a network run once.
    """

    def __init__(self, detectors: Sequence[Detector], device: torch.device, keep: bool = False) -> None:
        self.detectors, self.device, self.keep = detectors, device, keep
        self._moments = [] if keep else [Moments(detector.num_features, device) for detector in detectors]
        self._kept: list[list[torch.Tensor]] = [[] for _ in detectors]
        self._labels: list[torch.Tensor] = []
        self.image_size: list[int] | None = None  # height and width of the latest images

    def add(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        """Add a batch, uint8 [N, 1 or 3, H, W], and its classes, int64 [N], if they are known."""
        if labels is not None:
            self._labels.append(labels.cpu())
        self.image_size = list(images.shape[2:])
        found = detect(self.detectors, images.to(self.device))
        if self.keep:
            for rows, features in zip(self._kept, found, strict=True):
                rows.append(features.cpu())
        for moments, features in zip(self._moments, found, strict=False):
            moments.add(features)

    def statistics(self) -> tuple[int, dict[str, FeatureStatistics]]:
        """Count and statistics of all ranks' images. Every rank must call this, once. Only without `keep`."""
        sum_over_ranks_(self._moments)
        return statistics_of(self.detectors, self._moments)

    def features(self) -> dict[str, torch.Tensor]:
        """All ranks' features, in the order of the images, on rank 0. Every rank must call this. Only with `keep`."""
        result = {}
        for detector, rows in zip(self.detectors, self._kept, strict=True):
            result[detector.name] = torch.cat([torch.empty(0, detector.num_features), *_gathered(rows)])
        return result

    def labels(self) -> torch.Tensor:
        """All ranks' classes, in the same order, on rank 0; int64 [0] if none are known. Every rank must call this."""
        return torch.cat([torch.empty(0, dtype=torch.int64), *_gathered(self._labels)])


def _gathered(batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """All ranks' batches on rank 0, in order if batch k is on rank k modulo the number of ranks."""
    by_rank = dist.gather_on_rank0(batches)
    rounds = range(max(map(len, by_rank), default=0))
    return [found[k] for k in rounds for found in by_rank if k < len(found)]


def statistics_of(
    detectors: Sequence[Detector], moments: Sequence[Moments]
) -> tuple[int, dict[str, FeatureStatistics]]:
    """Count and statistics by detector. Raises ValueError for fewer than two images, or features not finite."""
    count, statistics = 0, {}
    for detector, one in zip(detectors, moments, strict=True):
        count, mean, covariance = one.mean_and_covariance()
        statistics[detector.name] = FeatureStatistics(mean, covariance, detector.fingerprint)
    return count, statistics
