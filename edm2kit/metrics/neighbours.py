"""Nearest neighbours among features, in bounded memory.

On a CPU, distances are computed in float32, which takes a quarter of the time of float64, as lower bounds: less the
largest possible rounding error. Wherever a bound leaves open which of two numbers is larger, the distance is computed
in float64 from the difference of the two rows. All results are therefore those of float64.
"""

from dataclasses import dataclass

import torch

from edm2kit.metrics import pairs
from edm2kit.metrics.pairs import PairVisitor, Rows, scaled_rows, visit_pairs
from edm2kit.torch_utils import dist

MANIFOLD_NEIGHBOURS = 3  # Kynkaanniemi et al. 2019 (arXiv 1904.06991)
COVERAGE_NEIGHBOURS = 5  # Naeem et al. 2020 (arXiv 2002.09797)
_ROUNDING = 1e-12  # of the squared length: what is left of the distance between copies
_PAIRS = 1 << 20  # of a tile, compared with radii at once
SPARE = 3  # candidates beyond those asked for: their bounds nearly always prove that no other row is nearer
_TINY = 1e-37  # about the least float32
_SPARE_OF_TIES = 64  # for the rows for which they do not
_GROUP = 16  # columns of a tile of which only the least is sorted at first


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
    counts = BallCounts(real, generated, manifold_neighbours, coverage_neighbours)
    visit_pairs(*scaled_rows(generated, real), [counts])
    return counts.found()


class BallCounts(PairVisitor):
    """Finds the balls of all images, and counts what is inside them. Arguments and errors as for `neighbourhood`."""

    needs_within = True

    def __init__(
        self,
        real: torch.Tensor,
        generated: torch.Tensor,
        manifold_neighbours: int = MANIFOLD_NEIGHBOURS,
        coverage_neighbours: int = COVERAGE_NEIGHBOURS,
    ) -> None:
        self._manifold, self._coverage = manifold_neighbours, coverage_neighbours
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
        m, n, device = len(generated), len(real), real.device
        self._is_precise = torch.zeros(m, dtype=torch.bool, device=device)
        self._num_balls = torch.zeros(m, dtype=torch.int64, device=device)
        self._is_recalled, self._is_covered = (torch.zeros(n, dtype=torch.bool, device=device) for _ in range(2))

    def start(self, generated: Rows, real: Rows) -> None:
        self._ours, self._theirs = generated, real
        self._near_real = Candidates(real, real, max(self._manifold, self._coverage))
        self._near_generated = Candidates(generated, generated, self._manifold)
        self._real_near_generated: Candidates | None = None

    def within_real(self, rows: slice, columns: slice, products: torch.Tensor) -> None:
        _add_both(self._near_real, rows, columns, products)

    def within_generated(self, rows: slice, columns: slice, products: torch.Tensor) -> None:
        _add_both(self._near_generated, rows, columns, products)

    def _find_radii(self) -> None:
        _, among_real = self._near_real.proven()
        del self._near_real
        self._real_squared_distance = among_real[:, 0].clone()
        self._real_manifold = among_real[:, self._manifold - 1].clone()
        self._real_coverage = among_real[:, self._coverage - 1].clone()
        self._generated_manifold = self._near_generated.proven()[1][:, -1].clone()
        del self._near_generated
        _warn_of_copies(self._generated_manifold, self._ours.lengths.mean() / self._ours.scale**2)
        self._reach_of_real = _upper_bounds(self._theirs, torch.maximum(self._real_manifold, self._real_coverage))
        self._reach_of_generated = _upper_bounds(self._ours, self._generated_manifold)

    def across(self, rows: slice, columns: slice, products: torch.Tensor) -> None:
        if self._real_near_generated is None:
            self._find_radii()
            self._real_near_generated = Candidates(self._ours, self._theirs, 1)
        bounds = lower_bounds(self._ours, self._theirs, rows, columns, products)
        self._real_near_generated.add(rows, bounds, columns.start)
        near = bounds <= self._reach_of_real[columns]
        near.logical_or_(bounds <= self._reach_of_generated[rows, None])
        # not more than _PAIRS at once, if all are near
        height = max(_PAIRS // near.shape[1], 1)
        for start, part in enumerate(near.split(height)):
            row, column = part.nonzero().unbind(dim=1)
            row = row + start * height
            self._count(row + rows.start, column + columns.start, bounds[row, column])

    def _count(self, row: torch.Tensor, column: torch.Tensor, bounds: torch.Tensor) -> None:
        """Enter pairs of generated and real images, given their lower bounds."""
        radii = torch.stack([self._real_manifold[column], self._real_coverage[column], self._generated_manifold[row]])
        in_manifold, in_coverage, in_generated = _settled(self._ours, self._theirs, row, column, bounds, radii) <= radii
        self._is_precise[row[in_manifold]] = True
        self._is_covered[column[in_coverage]] = True
        self._is_recalled[column[in_generated]] = True
        self._num_balls.add_(torch.bincount(row[in_coverage], minlength=len(self._num_balls)))

    def found(self) -> Neighbourhood:
        """The result, after all pairs."""
        assert self._real_near_generated is not None
        nearest, squared_distance = self._real_near_generated.proven()
        return Neighbourhood(
            self._is_precise,
            self._is_recalled,
            self._num_balls,
            self._is_covered,
            nearest[:, 0],
            squared_distance[:, 0],
            self._real_squared_distance,
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
    return _nearest(points, others, 1)[1][:, 0]


def nearest_indices(points: torch.Tensor, others: torch.Tensor, neighbours: int) -> torch.Tensor:
    """The numbers of the nearest `neighbours` of `others` [M, F] to each of `points` [N, F]: int64 [N, neighbours]."""
    return _nearest(points, others, neighbours)[0]


def _nearest(points: torch.Tensor, others: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    search = _Search(count)
    visit_pairs(*scaled_rows(points, others), [search])
    return search.candidates.proven()


class _Search(PairVisitor):
    """Finds the nearest `count` of the second set to each of the first."""

    def __init__(self, count: int) -> None:
        self._count = count

    def start(self, generated: Rows, real: Rows) -> None:
        self.candidates = Candidates(generated, real, self._count)

    def across(self, rows: slice, columns: slice, products: torch.Tensor) -> None:
        ours, theirs = self.candidates.ours, self.candidates.theirs
        self.candidates.add(rows, lower_bounds(ours, theirs, rows, columns, products), columns.start)


def lower_bounds(ours: Rows, theirs: Rows, rows: slice, columns: slice, products: torch.Tensor) -> torch.Tensor:
    """Of the squared distances of a tile, in the scale of its rows: no true one is smaller."""
    own, other = ((x.lengths[part] * (1 - x.error)).to(products.dtype) for x, part in ((ours, rows), (theirs, columns)))
    return torch.add(other, products, alpha=-2).add_(own[:, None])


def _upper_bounds(rows: Rows, squared_radii: torch.Tensor) -> torch.Tensor:
    """Squared radii in the scale and precision of `rows`, rounded up."""
    dtype = rows.scaled.dtype
    rounded_up = squared_radii * (rows.scale**2 * (1 + 2 * torch.finfo(dtype).eps)) + _TINY
    return rounded_up.to(dtype)


def _add_both(candidates: "Candidates", rows: slice, columns: slice, products: torch.Tensor) -> None:
    """Enter a tile of pairs within a set, which has rows and columns as neighbours of each other."""
    bounds = lower_bounds(candidates.ours, candidates.theirs, rows, columns, products)
    if rows == columns:
        bounds.fill_diagonal_(torch.inf)
    else:
        candidates.add(columns, bounds.T, rows.start)
    candidates.add(rows, bounds, columns.start)


@dataclass
class Least:
    """The least numbers of each row so far, sorted, and where they were: [N, kept] each."""

    values: torch.Tensor
    numbers: torch.Tensor

    @classmethod
    def none(cls, count: int, kept: int, like: torch.Tensor) -> "Least":
        values = torch.full([count, kept], torch.inf, dtype=like.dtype, device=like.device)
        return cls(values, torch.zeros(values.shape, dtype=torch.int64, device=like.device))

    def add(self, rows: slice, values: torch.Tensor, start: int) -> None:
        """Take the least of a tile [rows, columns], whose first column has the number `start`."""
        kept = self.values.shape[1]
        least, columns = _least(values, min(kept, values.shape[1]))
        numbers = torch.cat([self.numbers[rows], columns + start], dim=1)
        self.values[rows], order = torch.cat([self.values[rows], least], dim=1).topk(kept, dim=1, largest=False)
        self.numbers[rows] = numbers.gather(1, order)


def _least(values: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least `kept` numbers of each row, sorted, and their columns.

    They are in the groups of columns with the least minima: only those are searched, which takes an eighth of the time.
    """
    groups = values.shape[1] // _GROUP
    if groups < 2 * kept:
        return values.topk(kept, dim=1, largest=False)
    # group g has the columns g, g + groups, g + 2 groups, ...; columns beyond the last group are always searched
    minima = values[:, : groups * _GROUP].unflatten(1, (_GROUP, groups)).amin(dim=1)
    chosen = minima.topk(kept, dim=1, largest=False).indices
    steps = groups * torch.arange(_GROUP, device=values.device)
    beyond = torch.arange(groups * _GROUP, values.shape[1], device=values.device)
    columns = torch.cat([(chosen[:, :, None] + steps).flatten(1), beyond.expand(len(values), -1)], dim=1)
    least, order = values.gather(1, columns).topk(kept, dim=1, largest=False)
    return least, columns.gather(1, order)


class Candidates:
    """The rows of `theirs` that may be among the nearest `count` to each of `ours`, by lower bounds of their distances.

    `ours` and `theirs` may be one set; then no row is its own neighbour.
    """

    def __init__(self, ours: Rows, theirs: Rows, count: int) -> None:
        self.ours, self.theirs, self._count = ours, theirs, count
        self._num_others = len(theirs) - (ours is theirs)
        self._least = Least.none(len(ours), min(count + SPARE, self._num_others), ours.scaled)

    def add(self, rows: slice, bounds: torch.Tensor, start: int) -> None:
        """Enter the bounds of a tile [rows, columns], in the scale of `ours`; its first column has number `start`."""
        self._least.add(rows, bounds, start)

    def proven(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers, int64 [N, count], and squared distances, float64, of the nearest rows, sorted.

        They are the nearest in float64 of the candidates if no other row can be nearer, else of all rows.
        """
        found = []
        for rows in self.ours.tiles():
            numbers = self._least.numbers[rows]
            least = self._least.values[rows].double() / self.ours.scale**2
            lengths = self.ours.lengths[rows, None] + self.theirs.lengths[numbers]
            most = least + 2 * self.ours.error / self.ours.scale**2 * lengths
            found.append(proven(self.ours, self.theirs, rows, numbers, least, most, self._count))
        numbers, squared = (torch.cat(parts) for parts in zip(*found, strict=True))
        return numbers, squared


def proven(
    ours: Rows,
    theirs: Rows,
    rows: slice,
    numbers: torch.Tensor,
    least: torch.Tensor,
    most: torch.Tensor,
    count: int,
    is_sorted: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest `count` to some rows as from `Candidates.proven`, if those of `numbers` [n, kept] are the candidates.

    `least` and `most` [n, kept], float64, are bounds of their squared distances, `least` sorted; whatever is not a
    candidate of a row is at least as far as its last candidate may be. Without `is_sorted`, rows whose bounds say
    enough come in the order of their numbers and with distances of 0.
    """
    # so many are at most that far: whatever is farther for sure need not be computed
    is_near = least <= most.topk(count, dim=1, largest=False).values[:, -1:]
    numbers, order = numbers.sort(dim=1)
    is_near = is_near.gather(1, order)
    squared = torch.full(least.shape, torch.inf, dtype=torch.float64, device=least.device)
    if not is_sorted:
        is_settled = is_near & (is_near.sum(dim=1, keepdim=True) == count)
        squared[is_settled] = 0.0
        is_near &= ~is_settled
    row, place = is_near.nonzero().unbind(dim=1)
    squared[row, place] = _squared_distances(ours, theirs, row + rows.start, numbers[row, place])
    squared, order = squared.sort(dim=1, stable=True)
    numbers, squared = numbers.gather(1, order)[:, :count], squared[:, :count]
    others = len(theirs) - (ours is theirs)
    if least.shape[1] < others:
        for open_rows in (squared[:, -1] > least[:, -1]).nonzero()[:, 0].split(pairs.TILE_ROWS):
            nearest = _exact_candidates(ours, theirs, open_rows + rows.start, min(count + _SPARE_OF_TIES, others))
            found, found_squared = _sorted(ours, theirs, open_rows + rows.start, nearest)
            numbers[open_rows], squared[open_rows] = found[:, :count], found_squared[:, :count]
    return numbers, squared


def _exact_candidates(ours: Rows, theirs: Rows, rows: torch.Tensor, kept: int) -> torch.Tensor:
    """The numbers [n, kept] of the nearest to some rows of `ours`, by products in float64."""
    own = (ours.exact(rows) - ours.centre).mul_(ours.scale)
    least = Least.none(len(rows), kept, own)
    for columns in theirs.tiles():
        other = (theirs.exact(columns) - theirs.centre).mul_(theirs.scale)
        squared = torch.addmm(other.square().sum(dim=1), own, other.T, alpha=-2).add_(own.square().sum(dim=1)[:, None])
        if ours is theirs:
            squared[rows[:, None] == torch.arange(columns.start, columns.stop, device=rows.device)] = torch.inf
        least.add(slice(None), squared, columns.start)
    return least.numbers


def _sorted(ours: Rows, theirs: Rows, rows: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates of `rows` sorted by distance, of equal distances the lowest number first; and these distances."""
    numbers = numbers.sort(dim=1).values
    squared = _squared_distances(ours, theirs, rows.repeat_interleave(numbers.shape[1]), numbers.flatten())
    squared, order = squared.view(numbers.shape).sort(dim=1, stable=True)
    return numbers.gather(1, order), squared


def _squared_distances(ours: Rows, theirs: Rows, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """In float64, from the differences: the same bits whichever of two rows comes first."""
    chunk = max(pairs.EXACT_ELEMENTS // ours.given.shape[1], 1)
    squared = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for target, row, column in zip(squared.split(chunk), rows.split(chunk), columns.split(chunk), strict=True):
        difference = ours.exact(row).sub_(theirs.exact(column))
        torch.sum(difference.square_(), dim=1, out=target)
    return squared


def _settled(
    ours: Rows, theirs: Rows, rows: torch.Tensor, columns: torch.Tensor, bounds: torch.Tensor, radii: torch.Tensor
) -> torch.Tensor:
    """Squared distances of pairs [n] that compare with each of their radii [K, n] as the true ones do."""
    least = bounds.double() / ours.scale**2
    largest = least + 2 * ours.error * (ours.lengths[rows] + theirs.lengths[columns]) / ours.scale**2
    is_open = ((least <= radii) & (radii < largest)).any(dim=0)
    largest[is_open] = _squared_distances(ours, theirs, rows[is_open], columns[is_open])
    return largest
