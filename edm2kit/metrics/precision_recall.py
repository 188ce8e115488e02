"""Precision and recall, density and coverage: are generated images like real ones, and are all kinds there?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from edm2kit.metrics.detectors.registry import Detector
from edm2kit.torch_utils import dist

MANIFOLD_NEIGHBOURS = 3  # Kynkaanniemi et al. 2019 (arXiv 1904.06991)
COVERAGE_NEIGHBOURS = 5  # Naeem et al. 2020 (arXiv 2002.09797)
_BLOCK_ELEMENTS = 1 << 24  # of one block of distances: 128 MiB


@dataclass(frozen=True)
class Keeping:
    """A detector that keeps, on the CPU, the features it gives: float32 [N, F], 400 MB of 50,000 by Inception."""

    inner: Detector
    kept: list[torch.Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def num_features(self) -> int:
        return self.inner.num_features

    @property
    def fingerprint(self) -> str:
        return self.inner.fingerprint

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        features = self.inner(images)
        self.kept.append(features.cpu())
        return features

    def features(self) -> torch.Tensor:
        """The features of all ranks' images, on rank 0 and in no particular order; none elsewhere."""
        mine = torch.cat([torch.empty(0, self.num_features), *self.kept])
        return torch.cat([torch.empty(0, self.num_features), *dist.gather_on_rank0(mine)])


def neighbour_scores(
    real: torch.Tensor,
    fake: torch.Tensor,
    manifold_neighbours: int = MANIFOLD_NEIGHBOURS,
    coverage_neighbours: int = COVERAGE_NEIGHBOURS,
) -> dict[str, float]:
    """Precision, recall, density and coverage of features [N, F] and [M, F].

    An image's ball reaches to its k-th nearest neighbour in its own set. `precision` is the share of fakes in some
    real ball, `recall` the share of real images in some fake ball (k = `manifold_neighbours`); `density` the number
    of real balls that a fake is in, over k; `coverage` the share of real balls that hold a fake (k =
    `coverage_neighbours`). All depend on N and M: compare at equal numbers only. Raises ValueError for other shapes,
    too few images, and features that are not finite.
    """
    most = max(manifold_neighbours, coverage_neighbours)
    for features in (real, fake):
        if features.ndim != 2 or features.shape[1] != real.shape[1]:
            raise ValueError(f"features have shapes {list(real.shape)} and {list(fake.shape)}; expected [N, F], [M, F]")
        if len(features) <= most:
            raise ValueError(f"the {most} nearest neighbours of an image among {len(features)}; expected more images")
        if not features.isfinite().all():
            raise ValueError("the detector gave features that are not finite (NaN or infinity)")
    centre = real.double().mean(dim=0)  # distances come from products, which a common offset would round away
    real, fake = real.double() - centre, fake.double() - centre
    around_real, around_fake = (
        _radii(real, [manifold_neighbours, coverage_neighbours]),
        _radii(fake, [manifold_neighbours]),
    )
    recalled = covered = inside_balls = 0
    precise = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    for start, distances in _blocks(real, fake):
        rows = slice(start, start + len(distances))
        precise |= (distances <= around_real[0, rows, None]).any(dim=0)
        recalled += (distances <= around_fake[0]).any(dim=1).sum().item()
        inside = distances <= around_real[1, rows, None]
        covered += inside.any(dim=1).sum().item()
        inside_balls += inside.sum().item()
    return {
        "precision": precise.double().mean().item(),
        "recall": recalled / len(real),
        "density": inside_balls / (coverage_neighbours * len(fake)),
        "coverage": covered / len(real),
    }


def _radii(points: torch.Tensor, neighbours: Sequence[int]) -> torch.Tensor:
    """Squared distance of each point [N, F] to its k-th nearest neighbour, for each k: [len(neighbours), N]."""
    found = []
    for start, distances in _blocks(points, points):
        rows = torch.arange(len(distances), device=points.device)
        distances[rows, start + rows] = torch.inf  # not a neighbour of itself
        nearest = distances.topk(max(neighbours), dim=1, largest=False).values
        found.append(nearest[:, [k - 1 for k in neighbours]])
    return torch.cat(found).T


def _blocks(points: torch.Tensor, others: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, squared distances of some rows of `points` to all `others`), from the first row to the last."""
    size, lengths = max(_BLOCK_ELEMENTS // len(others), 1), others.square().sum(dim=1)
    for start in range(0, len(points), size):
        rows = points[start : start + size]
        products = torch.addmm(lengths, rows, others.T, alpha=-2)
        yield start, (products + rows.square().sum(dim=1, keepdim=True)).clamp_(min=0)
