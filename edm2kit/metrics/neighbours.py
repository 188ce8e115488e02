"""Nearest neighbours among features, in bounded memory: one pass over all pairs serves every metric that needs them.

On a CPU, distances are computed in float32, which takes half the time of float64, as lower bounds: less the largest
possible rounding error. Wherever a bound leaves open which of two numbers is larger, the distance is computed in
float64 from the difference of the two rows. All results are therefore those of float64.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from edm2kit.torch_utils import dist

MANIFOLD_NEIGHBOURS = 3  # Kynkaanniemi et al. 2019 (arXiv 1904.06991)
COVERAGE_NEIGHBOURS = 5  # Naeem et al. 2020 (arXiv 2002.09797)
_ROUNDING = 1e-12  # of the squared length: what is left of the distance between copies
_TILE_ROWS = 2048  # distances are computed in square tiles
_SHOWN_TILES = 8
_PAIRS = 1 << 20  # of a tile, compared with radii at once
_EXACT_ELEMENTS = 1 << 18  # features of pairs in float64 at once: small enough for the cache
_SPARE = 3  # candidates beyond those asked for: their bounds nearly always prove that no other row is nearer
_TINY = 1e-37  # about the least float32
_SPARE_OF_TIES = 64  # for the rows for which they do not


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

    Needs 4 F (N + M) bytes on a CPU (twice that on a GPU), and at most 256 MiB for tiles of distances, whatever N and
    M: 1.1 GiB for 50,000 images each of 2048 features. Raises ValueError for other shapes, too few images, and features
    that are not finite.
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
    ours, theirs = _scaled(generated, real)
    _, among_real = _nearest_others(theirs, most)
    real_manifold = among_real[:, manifold_neighbours - 1]
    real_coverage = among_real[:, coverage_neighbours - 1]
    generated_manifold = _nearest_others(ours, manifold_neighbours)[1][:, -1]
    _warn_of_copies(generated_manifold, ours.lengths.mean() / ours.scale**2)

    is_precise = torch.zeros(len(generated), dtype=torch.bool, device=generated.device)
    num_balls = torch.zeros(len(generated), dtype=torch.int64, device=generated.device)
    is_recalled, is_covered = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    reach_of_real = theirs.upper_bounds(torch.maximum(real_manifold, real_coverage))
    reach_of_generated = ours.upper_bounds(generated_manifold)

    def count_balls(rows: slice, columns: slice, bounds: torch.Tensor) -> None:
        near = (bounds <= reach_of_real[columns]).logical_or_(bounds <= reach_of_generated[rows, None])
        for pairs in near.nonzero().split(_PAIRS):
            row, column = pairs[:, 0] + rows.start, pairs[:, 1] + columns.start
            radii = torch.stack([real_manifold[column], real_coverage[column], generated_manifold[row]])
            squared = _settled(ours, theirs, row, column, bounds[pairs[:, 0], pairs[:, 1]], radii)
            in_manifold, in_coverage, in_generated = squared <= radii
            is_precise[row[in_manifold]] = True
            is_covered[column[in_coverage]] = True
            is_recalled[column[in_generated]] = True
            num_balls.add_(torch.bincount(row[in_coverage], minlength=len(num_balls)))

    nearest, squared_distance = _nearest(ours, theirs, 1, count_balls)
    return Neighbourhood(
        is_precise, is_recalled, num_balls, is_covered, nearest[:, 0], squared_distance[:, 0], among_real[:, 0]
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
    return _nearest(*_scaled(points, others), 1)[1][:, 0]


def nearest_indices(points: torch.Tensor, others: torch.Tensor, neighbours: int) -> torch.Tensor:
    """The numbers of the nearest `neighbours` of `others` [M, F] to each of `points` [N, F]: int64 [N, neighbours]."""
    return _nearest(*_scaled(points, others), neighbours)[0]


@dataclass(frozen=True)
class _Rows:
    """Rows in the precision in which all pairs are computed, and what is known of their errors."""

    given: torch.Tensor  # [N, F]
    centre: torch.Tensor  # float64 [F]
    scale: float  # a power of two: no square overflows
    scaled: torch.Tensor  # float32 or float64 [N, F]: (given - centre) * scale
    lengths: torch.Tensor  # float64 [N]: squared, of `scaled`
    error: float  # of a squared distance, as a fraction of the sum of both lengths

    def tiles(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Which rows, the rows themselves, and their squared lengths less their share of the error."""
        for start in range(0, len(self.given), _TILE_ROWS):
            tile = slice(start, min(start + _TILE_ROWS, len(self.given)))
            yield tile, self.scaled[tile], (self.lengths[tile] * (1 - self.error)).to(self.scaled.dtype)

    def upper_bounds(self, squared_radii: torch.Tensor) -> torch.Tensor:
        """Squared radii in the scale and precision of `scaled`, rounded up."""
        dtype = self.scaled.dtype
        rounded_up = squared_radii * (self.scale**2 * (1 + 2 * torch.finfo(dtype).eps)) + _TINY
        return rounded_up.to(dtype)

    def in_float64(self, rows: torch.Tensor | slice) -> torch.Tensor:
        return (self.given[rows].double() - self.centre).mul_(self.scale)


def _scaled(points: torch.Tensor, others: torch.Tensor) -> tuple[_Rows, _Rows]:
    """Both about the mean of `others`: distances are computed from products, in which a large mean would cancel."""
    # TF32 and bfloat16, which may stand for float32 by a setting, have larger errors
    is_float32 = points.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    dtype = torch.float32 if is_float32 else torch.float64
    # The sum of F products is off by F half units at most; 16 are for the rounding of rows, lengths and their sums.
    error = 1.01 * (points.shape[1] + 16) * torch.finfo(dtype).eps / 2
    centre = others.mean(dim=0, dtype=torch.float64)
    chunk = max(_EXACT_ELEMENTS // points.shape[1], 1)
    sets = (points, others)
    lengths = []
    for rows in sets:
        lengths.append(torch.cat([(part.double() - centre).square_().sum(dim=1) for part in rows.split(chunk)]))
    _, exponent = math.frexp(math.sqrt(max(float(squared.max()) for squared in lengths)))
    scale = 2.0**-exponent
    results = []
    for rows, squared in zip(sets, lengths, strict=True):
        scaled = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        results.append(_Rows(rows, centre, scale, scaled, squared * scale**2, error))
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            scaled[part] = results[-1].in_float64(part)
    return results[0], results[1]


def _lower_bounds(
    rows: torch.Tensor, lengths: torch.Tensor, others: torch.Tensor, other_lengths: torch.Tensor
) -> torch.Tensor:
    """Of the squared distances of two tiles: no true one is smaller."""
    return torch.addmm(other_lengths, rows, others.T, alpha=-2).add_(lengths[:, None]).clamp_(min=0)


@dataclass
class _Candidates:
    """The least bounds of each row so far, sorted, and the numbers of the rows that they belong to: [N, kept] each."""

    bounds: torch.Tensor
    numbers: torch.Tensor

    @classmethod
    def none(cls, rows: torch.Tensor, kept: int) -> "_Candidates":
        bounds = torch.full([len(rows), kept], torch.inf, dtype=rows.dtype, device=rows.device)
        return cls(bounds, torch.zeros(bounds.shape, dtype=torch.int64, device=rows.device))

    def add(self, bounds: torch.Tensor, start: int) -> None:
        """Take the least of those of a tile, whose first column has the number `start`."""
        kept = self.bounds.shape[1]
        least, columns = bounds.topk(min(kept, bounds.shape[1]), dim=1, largest=False)
        numbers = torch.cat([self.numbers, columns + start], dim=1)
        self.bounds, order = torch.cat([self.bounds, least], dim=1).topk(kept, dim=1, largest=False)
        self.numbers = numbers.gather(1, order)


def _nearest(
    ours: _Rows, theirs: _Rows, count: int, visit: Callable[[slice, slice, torch.Tensor], None] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers, int64 [N, count], and squared distances, float64, of the nearest of `theirs` to each of `ours`, sorted.

    `visit` gets the rows and columns of every tile, and its lower bounds of scaled squared distances.
    """
    kept = min(count + _SPARE, len(theirs.given))
    found = []
    with _progress(ours) as bar:
        for rows, own, lengths in ours.tiles():
            candidates = _Candidates.none(own, kept)
            for columns, other, other_lengths in theirs.tiles():
                bounds = _lower_bounds(own, lengths, other, other_lengths)
                candidates.add(bounds, columns.start)
                if visit is not None:
                    visit(rows, columns, bounds)
            found.append(candidates)
            bar.update()
    return _proven(ours, theirs, found, count)


def _nearest_others(points: _Rows, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same among the points themselves, without the point: distances are symmetric, half of the tiles suffice."""
    kept = min(count + _SPARE, len(points.given) - 1)
    tiles = list(points.tiles())
    found = [_Candidates.none(rows, kept) for _, rows, _ in tiles]
    with _progress(points) as bar:
        for a, (rows, own, lengths) in enumerate(tiles):
            for b, (columns, other, other_lengths) in enumerate(tiles[a:], start=a):
                bounds = _lower_bounds(own, lengths, other, other_lengths)
                if a == b:
                    bounds.fill_diagonal_(torch.inf)
                else:
                    found[b].add(bounds.T.contiguous(), rows.start)
                found[a].add(bounds, columns.start)
            bar.update()
    return _proven(points, points, found, count)


def _progress(rows: _Rows) -> tqdm:
    tiles = math.ceil(len(rows.given) / _TILE_ROWS)
    return dist.progress_bar(tiles, "tile", what="neighbours", hidden=tiles <= _SHOWN_TILES)


def _proven(ours: _Rows, theirs: _Rows, found: list[_Candidates], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest in float64 of candidates, where no other row can be nearer; elsewhere of all rows."""
    bounds, numbers = (torch.cat(parts) for parts in zip(*((one.bounds, one.numbers) for one in found), strict=True))
    numbers, squared = _sorted(ours, theirs, torch.arange(len(numbers), device=numbers.device), numbers)
    others = len(theirs.given) - (ours is theirs)
    if numbers.shape[1] < others:
        # whatever is not a candidate has a bound of at least the last candidate's
        is_open = squared[:, count - 1] * ours.scale**2 > bounds[:, -1].double()
        for rows in is_open.nonzero()[:, 0].split(_TILE_ROWS):
            again = _Candidates.none(ours.in_float64(rows), min(count + _SPARE_OF_TIES, others))
            own = ours.in_float64(rows)
            for columns, _, _ in theirs.tiles():
                other = theirs.in_float64(columns)
                close = _lower_bounds(own, own.square().sum(dim=1), other, other.square().sum(dim=1))
                if ours is theirs:
                    close[rows[:, None] == torch.arange(columns.start, columns.stop, device=rows.device)] = torch.inf
                again.add(close, columns.start)
            kept_numbers, kept_squared = _sorted(ours, theirs, rows, again.numbers)
            numbers[rows], squared[rows] = kept_numbers[:, : numbers.shape[1]], kept_squared[:, : numbers.shape[1]]
    return numbers[:, :count], squared[:, :count]


def _sorted(ours: _Rows, theirs: _Rows, rows: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates of `rows` sorted by distance, of equal distances the lowest number first; and these distances."""
    numbers = numbers.sort(dim=1).values
    squared = _squared_distances(ours, theirs, rows.repeat_interleave(numbers.shape[1]), numbers.flatten())
    squared, order = squared.view(numbers.shape).sort(dim=1, stable=True)
    return numbers.gather(1, order), squared


def _squared_distances(ours: _Rows, theirs: _Rows, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """In float64, from the differences: the same bits whichever of two rows comes first."""
    chunk = max(_EXACT_ELEMENTS // ours.given.shape[1], 1)
    squared = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for target, row, column in zip(squared.split(chunk), rows.split(chunk), columns.split(chunk), strict=True):
        difference = ours.given[row].double().sub_(theirs.given[column])
        torch.sum(difference.square_(), dim=1, out=target)
    return squared


def _settled(
    ours: _Rows, theirs: _Rows, rows: torch.Tensor, columns: torch.Tensor, bounds: torch.Tensor, radii: torch.Tensor
) -> torch.Tensor:
    """Squared distances of pairs [n] that compare with each of their radii [K, n] as the true ones do."""
    least = bounds.double() / ours.scale**2
    largest = least + 2 * ours.error * (ours.lengths[rows] + theirs.lengths[columns]) / ours.scale**2
    is_open = ((least <= radii) & (radii < largest)).any(dim=0)
    largest[is_open] = _squared_distances(ours, theirs, rows[is_open], columns[is_open])
    return largest
