"""Mean and covariance of features that stream by, in float64."""

from collections.abc import Sequence

import numpy as np
import torch

from edm2kit.torch_utils import dist

_BUFFER_ROWS = 1024  # long products run several times faster than one per batch
_BLOCK_COLUMNS = 256  # the outer sum is symmetric: only blocks on and above the diagonal are computed


class Moments:
    """Running count, sum and sum of outer products of float32 feature rows, on one device and this rank.

    Sums about zero, and not about a mean, are what one all-reduce can add up. A mean of k standard deviations costs
    the covariance k^2 * 1e-14 of its size; features of images have k below 100.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu"):
        self.num_features = num_features
        # mps has no float64
        self._device = torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)
        self._count = 0
        self._sum = torch.zeros(num_features, dtype=torch.float64, device=self._device)
        self._outer = torch.zeros(num_features, num_features, dtype=torch.float64, device=self._device)
        self._buffer = torch.empty(_BUFFER_ROWS, num_features, dtype=torch.float64, device=self._device)
        self._buffered_rows = 0

    def add(self, features: torch.Tensor) -> None:
        """Take in rows, float32 [N, F]; N may be 0. Raises ValueError for another shape."""
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
        """Number of rows, mean [F] and covariance [F, F] (divided by n - 1), float64.

        Raises ValueError for fewer than two rows and for features that are not finite.
        """
        self._flush()
        if self._count < 2:
            raise ValueError(f"a covariance needs at least 2 images; got {self._count}")
        if not torch.isfinite(self._sum).all():
            raise ValueError("the detector gave features that are not finite (NaN or infinity)")
        mean = self._sum / self._count
        upper = (self._outer - torch.outer(self._sum, mean)).triu() / (self._count - 1)
        covariance = upper + upper.triu(1).T
        return self._count, mean.cpu().numpy(), covariance.cpu().numpy()


def sum_over_ranks_(moments: Sequence[Moments]) -> None:
    """Make each of `moments` that of all ranks' rows together, in one all-reduce; a rank may have no rows."""
    for one in moments:
        one._flush()
    counts = torch.tensor([one._count for one in moments], dtype=torch.float64, device=moments[0]._device)
    packed = dist.all_reduce_sum_(
        torch.cat([counts, *(part.flatten() for m in moments for part in (m._sum, m._outer))])
    )
    position = len(moments)
    for one, count in zip(moments, packed[:position].tolist(), strict=True):
        one._count = int(count)
        for part in (one._sum, one._outer):
            part.copy_(packed[position : position + part.numel()].view_as(part))
            position += part.numel()
