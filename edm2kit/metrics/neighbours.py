"""Nearest neighbours among features, in bounded memory: one pass over all pairs serves every metric that needs them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from edm2kit.torch_utils import dist

MANIFOLD_NEIGHBOURS = 3  # Kynkaanniemi et al. 2019 (arXiv 1904.06991)
COVERAGE_NEIGHBOURS = 5  # Naeem et al. 2020 (arXiv 2002.09797)
_ROUNDING = 1e-12  # of the squared length: what is left of the distance between copies
_BLOCK_ELEMENTS = 1 << 24  # distances computed at once: 128 MiB
_TILE_ROWS = 2048
_SHOWN_TILES = 8


@dataclass(frozen=True)
class Neighbourhood:
    """Which balls around real images [N] and generated images [M] contain which images of the other set.

    The ball around an image reaches to its k-th nearest neighbour in its own set: k = 3 for `is_precise` and
    `is_recalled`, k = 5 for `num_balls` and `is_covered`.
    """

    is_precise: torch.Tensor  # bool [M]: generated image inside a real ball
    is_recalled: torch.Tensor  # bool [N]: real image inside a generated ball
    num_balls: torch.Tensor  # int64 [M]: real balls around a generated image
    is_covered: torch.Tensor  # bool [N]: real ball with a generated image inside
    nearest_real: torch.Tensor  # int64 [M]: the real image nearest to a generated one
    squared_distance_to_real: torch.Tensor  # float64 [M]: to that real image
    real_squared_distance: torch.Tensor  # float64 [N]: from a real image to its nearest real neighbour


def neighbourhood(
    real: torch.Tensor,
    generated: torch.Tensor,
    manifold_neighbours: int = MANIFOLD_NEIGHBOURS,
    coverage_neighbours: int = COVERAGE_NEIGHBOURS,
) -> Neighbourhood:
    """The neighbourhood of real features [N, F] and generated features [M, F].

    Needs 8 F (N + M) bytes for both in float64, and at most 384 MiB for blocks of distances, whatever N and M: 2 GiB
    for 50,000 images each of 2048 features. Raises ValueError for other shapes, too few images, and features that are
    not finite.
    """
    most = max(manifold_neighbours, coverage_neighbours)
    for features in (real, generated):
        if features.ndim != 2 or features.shape[1] != real.shape[1]:
            raise ValueError(
                f"features have shapes {list(real.shape)} and {list(generated.shape)}; expected [N, F], [M, F]"
            )
        if len(features) <= most:
            raise ValueError(f"{len(features)} images have no {most} nearest neighbours each; expected more images")
        if not features.isfinite().all():
            raise ValueError("the detector returned features that are not finite (NaN or infinity)")
    centre = real.double().mean(dim=0)  # distances are computed from products, in which a large mean would cancel
    real, generated = (rows.to(torch.float64, copy=True).sub_(centre) for rows in (real, generated))
    real_manifold, real_coverage, real_nearest = _squared_radii(real, [manifold_neighbours, coverage_neighbours, 1])
    (generated_manifold,) = _squared_radii(generated, [manifold_neighbours])
    _warn_of_copies(generated_manifold, generated.square().sum(dim=1).mean())

    is_precise = torch.zeros(len(generated), dtype=torch.bool, device=generated.device)
    num_balls = torch.zeros(len(generated), dtype=torch.int64, device=generated.device)
    nearest_real = torch.zeros_like(num_balls)
    squared_distance = torch.full([len(generated)], torch.inf, dtype=torch.float64, device=generated.device)
    is_recalled, is_covered = [], []
    for start, squared_distances in _distance_blocks(real, generated):
        rows = slice(start, start + len(squared_distances))
        is_precise |= (squared_distances <= real_manifold[rows, None]).any(dim=0)
        is_recalled.append((squared_distances <= generated_manifold).any(dim=1))
        inside = squared_distances <= real_coverage[rows, None]
        is_covered.append(inside.any(dim=1))
        num_balls += inside.sum(dim=0)
        smallest, row = squared_distances.min(dim=0)
        nearest_real = torch.where(smallest < squared_distance, row + start, nearest_real)
        squared_distance = torch.minimum(squared_distance, smallest)
    return Neighbourhood(
        is_precise,
        torch.cat(is_recalled),
        num_balls,
        torch.cat(is_covered),
        nearest_real,
        squared_distance,
        real_nearest,
    )


def _warn_of_copies(squared_radii: torch.Tensor, squared_length: torch.Tensor) -> None:
    copies = int((squared_radii <= _ROUNDING * squared_length).sum())
    if copies:
        dist.warn0(
            f"{copies} of {len(squared_radii)} generated images have {MANIFOLD_NEIGHBOURS} exact copies among them: "
            "their neighbourhoods are empty, so precision, recall and coverage mean little. Check the images"
        )


def nearest_distances(points: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The squared distance of each of `points` [N, F] to the nearest of `others` [M, F], float64 [N]."""
    centre = others.double().mean(dim=0)
    blocks = _distance_blocks(points.double() - centre, others.double() - centre)
    return torch.cat([squared_distances.amin(dim=1) for _, squared_distances in blocks])


def nearest_indices(points: torch.Tensor, others: torch.Tensor, neighbours: int) -> torch.Tensor:
    """The numbers of the nearest `neighbours` of `others` [M, F] to each of `points` [N, F]: int64 [N, neighbours]."""
    centre = others.double().mean(dim=0)
    blocks = _distance_blocks(points.double() - centre, others.double() - centre)
    return torch.cat([squared.topk(neighbours, dim=1, largest=False).indices for _, squared in blocks])


def _squared_radii(points: torch.Tensor, neighbours: Sequence[int]) -> torch.Tensor:
    """Squared distance of each point [N, F] to its k-th nearest neighbour, for each k: [len(neighbours), N].

    Distances are symmetric, so only square tiles on and above the diagonal are computed.
    """
    most = max(neighbours)
    tiles = points.split(_TILE_ROWS)
    lengths = [tile.square().sum(dim=1) for tile in tiles]
    nearest = [torch.full([len(tile), most], torch.inf, dtype=points.dtype, device=points.device) for tile in tiles]
    with dist.progress_bar(len(tiles), "tile", what="neighbours", hidden=len(tiles) <= _SHOWN_TILES) as bar:
        for a, rows in enumerate(tiles):
            for b in range(a, len(tiles)):
                squared = torch.addmm(lengths[b], rows, tiles[b].T, alpha=-2).add_(lengths[a][:, None]).clamp_(min=0)
                if a == b:
                    squared.fill_diagonal_(torch.inf)  # a point is not its own neighbour
                else:
                    nearest[b] = _least(nearest[b], squared.T, most)
                nearest[a] = _least(nearest[a], squared, most)
            bar.update()
    return torch.cat(nearest)[:, [k - 1 for k in neighbours]].T


def _least(known: torch.Tensor, more: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` least of each row of both, sorted."""
    fresh = more.topk(min(count, more.shape[1]), dim=1, largest=False).values
    return torch.cat([known, fresh], dim=1).sort(dim=1).values[:, :count]


def _distance_blocks(points: torch.Tensor, others: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, squared distances from a block of rows of `points` to all `others`), for all rows in order."""
    block_rows = max(_BLOCK_ELEMENTS // len(others), 1)
    squared_lengths = others.square().sum(dim=1)
    with dist.progress_bar(len(points), what="neighbours", hidden=len(points) <= block_rows) as bar:
        for start in range(0, len(points), block_rows):
            rows = points[start : start + block_rows]
            products = torch.addmm(squared_lengths, rows, others.T, alpha=-2)
            yield start, products.add_(rows.square().sum(dim=1, keepdim=True)).clamp_(min=0)
            bar.update(len(rows))
