"""Do generated images show the class they were asked for? A vote of the nearest real images."""

from dataclasses import replace

import torch

from edm2kit.metrics import pairs
from edm2kit.metrics.neighbours import SPARE, Least, proven
from edm2kit.metrics.pairs import PairVisitor, Rows
from edm2kit.metrics.score import Sample, Score

NEIGHBOURS = 10
_LEAST_NORM = 1e-12  # rows that are shorter count as zeros
_LEAST_SCALED_NORM = 1e-30  # beyond which float32 is not used


def knn_agreement(sample: Sample) -> Score:
    """The share of generated images whose class is the most frequent among the 10 nearest real images (by cosine).

    Of equally frequent classes, the one of the lowest number counts. Real images that were not compared with themselves
    give the value to compare with: it need not be near 1. Raises ValueError without classes of both sides.
    """
    if sample.labels is None or sample.real_labels is None:
        raise ValueError(
            "knn_agreement needs the classes of generated and real images: class folders, a dataset.json, images of "
            "generate.py, or a class-conditional network"
        )
    nearest = sample.visited(cosine_neighbours).found().cpu()
    classes = sample.real_labels[nearest]
    votes = torch.zeros(len(nearest), int(sample.real_labels.max()) + 1, dtype=torch.int32)
    votes.scatter_add_(1, classes, torch.ones_like(classes, dtype=torch.int32))
    return Score.mean_of(votes.argmax(dim=1) == sample.labels)


def cosine_neighbours(sample: Sample) -> "CosineNeighbours":
    """The search for the voters of `knn_agreement`. Raises ValueError for too few real images."""
    if len(sample.real_features) < NEIGHBOURS:
        raise ValueError(f"knn_agreement needs at least {NEIGHBOURS} real images; got {len(sample.real_features)}")
    return CosineNeighbours(NEIGHBOURS)


class CosineNeighbours(PairVisitor):
    """Finds the `count` real images with the largest cosine to each generated one, as float64 says.

    With the centre c of products, x y = (x - c) (y - c) + of_x + of_y.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def start(self, generated: Rows, real: Rows) -> None:
        dtype, epsilon = generated.scaled.dtype, torch.finfo(generated.scaled.dtype).eps
        self._norms, self._units, self._slack, self._of = [], [], [], []
        for rows in (generated, real):
            chunk = max(pairs.EXACT_ELEMENTS // rows.given.shape[1], 1)
            norms = torch.cat([part.double().norm(dim=1) for part in rows.given.split(chunk)])
            factors = 1 / norms.clamp(min=_LEAST_NORM)
            self._norms.append(norms * rows.scale)
            self._units.append(replace(rows, centre=torch.zeros_like(rows.centre), scale=1.0, factors=factors))
            of = (rows.along_centre + rows.centre.square().sum() / 2) * rows.scale**2
            # Half of the error of a squared distance is that of a product; it covers the rounding of both sums, apart
            # from that of the summands themselves.
            slack = rows.error / 2 * rows.lengths + 4 * epsilon * of.abs()
            slack[(norms < _LEAST_NORM) | (self._norms[-1] < _LEAST_SCALED_NORM)] = torch.inf
            self._slack.append(slack)
            self._of.append((of + slack).to(dtype))
        self._weights = 1 / self._norms[1].clamp(min=_LEAST_SCALED_NORM)
        self._minus_weights = (-self._weights).to(dtype)
        self._least = Least.none(len(generated), min(self._count + SPARE, len(real)), generated.scaled)

    def across(self, rows: slice, columns: slice, products: torch.Tensor) -> None:
        of_generated, of_real = self._of
        # minus an upper bound of the cosine, times the length of the generated row
        bounds = (products + of_real[columns]).add_(of_generated[rows, None]).mul_(self._minus_weights[columns])
        self._least.add(rows, bounds, columns.start)

    def found(self) -> torch.Tensor:
        """The numbers of the nearest real images, int64 [N, count], in no certain order, after all pairs."""
        ours, theirs = self._units
        found = []
        for rows in ours.tiles():
            numbers = self._least.numbers[rows]
            slack = (self._slack[0][rows, None] + self._slack[1][numbers]) * self._weights[numbers]
            largest = -self._least.values[rows].double()
            # of unit rows, |x - y|^2 = 2 - 2 x y
            least, most = (2 - 2 * x / self._norms[0][rows, None] for x in (largest, largest - 2 * slack))
            least, most = least.where(slack.isfinite(), -torch.inf), most.where(slack.isfinite(), torch.inf)
            found.append(proven(ours, theirs, rows, numbers, least, most, self._count, is_sorted=False)[0])
        return torch.cat(found)
