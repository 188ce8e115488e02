"""Precision and recall, density and coverage: do generated images look real, and do they cover all real images?"""

from collections.abc import Iterator, Sequence

import torch

MANIFOLD_NEIGHBOURS = 3  # Kynkaanniemi et al. 2019 (arXiv 1904.06991)
COVERAGE_NEIGHBOURS = 5  # Naeem et al. 2020 (arXiv 2002.09797)
_BLOCK_ELEMENTS = 1 << 24  # distances computed at once: 128 MiB


def neighbour_scores(
    real: torch.Tensor,
    fake: torch.Tensor,
    manifold_neighbours: int = MANIFOLD_NEIGHBOURS,
    coverage_neighbours: int = COVERAGE_NEIGHBOURS,
) -> dict[str, float]:
    """Precision, recall, density and coverage of generated features [M, F] against real features [N, F].

    The ball around an image reaches to its k-th nearest neighbour in its own set. With k = `manifold_neighbours`,
    `precision` is the fraction of generated images inside a real ball, and `recall` the fraction of real images inside
    a generated ball. With k = `coverage_neighbours`, `density` is the mean number of real balls around a generated
    image, divided by k, and `coverage` the fraction of real balls that contain a generated image.

    All four depend on N and M, so compare only values from equal numbers of images. Raises ValueError for other shapes,
    too few images, and features that are not finite.

    Example: `neighbour_scores(detector(real_images), detector(fake_images))["recall"]`
    """
    most = max(manifold_neighbours, coverage_neighbours)
    for features in (real, fake):
        if features.ndim != 2 or features.shape[1] != real.shape[1]:
            raise ValueError(f"features have shapes {list(real.shape)} and {list(fake.shape)}; expected [N, F], [M, F]")
        if len(features) <= most:
            raise ValueError(f"{len(features)} images have no {most} nearest neighbours each; expected more images")
        if not features.isfinite().all():
            raise ValueError("the detector returned features that are not finite (NaN or infinity)")
    centre = real.double().mean(dim=0)  # distances are computed from products, in which a large mean would cancel
    real, fake = real.double() - centre, fake.double() - centre
    real_manifold_radii, real_coverage_radii = _squared_radii(real, [manifold_neighbours, coverage_neighbours])
    (fake_manifold_radii,) = _squared_radii(fake, [manifold_neighbours])

    num_recalled = num_covered = num_inside = 0
    is_precise = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    for start, squared_distances in _distance_blocks(real, fake):
        rows = slice(start, start + len(squared_distances))
        is_precise |= (squared_distances <= real_manifold_radii[rows, None]).any(dim=0)
        num_recalled += int((squared_distances <= fake_manifold_radii).any(dim=1).sum())
        inside = squared_distances <= real_coverage_radii[rows, None]
        num_covered += int(inside.any(dim=1).sum())
        num_inside += int(inside.sum())
    return {
        "precision": is_precise.double().mean().item(),
        "recall": num_recalled / len(real),
        "density": num_inside / (coverage_neighbours * len(fake)),
        "coverage": num_covered / len(real),
    }


def _squared_radii(points: torch.Tensor, neighbours: Sequence[int]) -> torch.Tensor:
    """Squared distance of each point [N, F] to its k-th nearest neighbour, for each k: [len(neighbours), N]."""
    radii = []
    for start, squared_distances in _distance_blocks(points, points):
        rows = torch.arange(len(squared_distances), device=points.device)
        squared_distances[rows, start + rows] = torch.inf  # a point is not its own neighbour
        nearest = squared_distances.topk(max(neighbours), dim=1, largest=False).values
        radii.append(nearest[:, [k - 1 for k in neighbours]])
    return torch.cat(radii).T


def _distance_blocks(points: torch.Tensor, others: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, squared distances from a block of rows of `points` to all `others`), for all rows in order."""
    block_rows = max(_BLOCK_ELEMENTS // len(others), 1)
    squared_lengths = others.square().sum(dim=1)
    for start in range(0, len(points), block_rows):
        rows = points[start : start + block_rows]
        products = torch.addmm(squared_lengths, rows, others.T, alpha=-2)
        yield start, (products + rows.square().sum(dim=1, keepdim=True)).clamp_(min=0)
