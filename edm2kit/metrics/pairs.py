"""All pairs of generated and real images, tile by tile in bounded memory: one pass serves every metric that needs them.

On a CPU, products of features are computed in float32, which takes a quarter of the time of float64, and a bound of
their rounding errors is known. Visitors that compare exactly compute what the bound leaves open in float64.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from edm2kit.metrics.moments import product_dtype, row_products
from edm2kit.torch_utils import dist

TILE_ROWS = 2048  # products are computed in square tiles
_SHOWN_TILES = 8
EXACT_ELEMENTS = 1 << 16  # features in float64 at once: small enough for the cache

Visit = Callable[[slice, slice, torch.Tensor], None]  # numbers of rows and of columns, their products


@dataclass(frozen=True)
class Rows:
    """The features of a set in the precision in which all pairs are computed, and what is known of their errors.

    What is compared are the rows `given`, times `factors` if there are any.
    """

    given: torch.Tensor  # [N, F]
    centre: torch.Tensor  # float64 [F]
    scale: float  # a power of two: no square overflows
    scaled: torch.Tensor  # float32 or float64 [N, F]: (given - centre) * scale
    lengths: torch.Tensor  # float64 [N]: squared, of `scaled`
    along_centre: torch.Tensor  # float64 [N]: (given - centre) . centre
    error: float  # of a squared distance, as a fraction of the sum of both lengths
    factors: torch.Tensor | None = None  # float64 [N]

    def __len__(self) -> int:
        return len(self.scaled)

    def tiles(self) -> Iterator[slice]:
        """The numbers of the rows, some at a time."""
        for start in range(0, len(self), TILE_ROWS):
            yield slice(start, min(start + TILE_ROWS, len(self)))

    def exact(self, numbers: torch.Tensor | slice) -> torch.Tensor:
        """Some rows in float64."""
        rows = self.given[numbers].double()
        return rows if self.factors is None else rows * self.factors[numbers, None]

    def pick(self, numbers: torch.Tensor) -> "Rows":
        """A selection of rows, for products alone: without `given`."""
        parts = {name: getattr(self, name)[numbers] for name in ("scaled", "lengths", "along_centre")}
        return replace(self, given=self.given[:0], **parts)


class PairVisitor:
    """Sees the products of all pairs, a tile at a time: those of `rows` and `columns`, [rows, columns] of `scaled`.

    Within a set, tiles on the diagonal have every pair twice, and of two tiles that mirror each other only the one
    above the diagonal comes. Products belong to all visitors and must not be changed.
    """

    needs_within = False  # whether pairs within the sets are needed

    def start(self, generated: Rows, real: Rows) -> None:
        """Called first, with both sets."""

    def within_real(self, rows: slice, columns: slice, products: torch.Tensor) -> None:
        """Pairs of real images."""

    def within_generated(self, rows: slice, columns: slice, products: torch.Tensor) -> None:
        """Pairs of generated images."""

    def across(self, rows: slice, columns: slice, products: torch.Tensor) -> None:
        """Pairs of generated (rows) and real images (columns), after all pairs within the sets."""


def visit_pairs(generated: Rows, real: Rows, visitors: Sequence[PairVisitor]) -> None:
    """Show the products of all pairs to all `visitors`; both sets come from one call of `scaled_rows`."""
    for visitor in visitors:
        visitor.start(generated, real)
    within = [visitor for visitor in visitors if visitor.needs_within]
    a, b = (math.ceil(len(rows) / TILE_ROWS) for rows in (generated, real))
    total = a * b + (a * (a + 1) // 2 + b * (b + 1) // 2 if within else 0)
    with dist.progress_bar(total, "tile", what="neighbours", hidden=max(a, b) <= _SHOWN_TILES) as bar:

        def show(ours: Rows, theirs: Rows, visits: Sequence[Visit]) -> None:
            for rows in ours.tiles():
                for columns in theirs.tiles():
                    if ours is theirs and columns.start < rows.start:
                        continue
                    tile = row_products(ours.scaled[rows], theirs.scaled[columns])
                    for visit in visits:
                        visit(rows, columns, tile)
                    del tile  # before the next one is made
                    bar.update()

        if within:
            show(real, real, [visitor.within_real for visitor in within])
            show(generated, generated, [visitor.within_generated for visitor in within])
        show(generated, real, [visitor.across for visitor in visitors])


def scaled_rows(points: torch.Tensor, others: torch.Tensor) -> tuple[Rows, Rows]:
    """Both sets about the mean of `others`: in distances computed from products, a large mean would cancel."""
    dtype = product_dtype(points.device)
    # The sum of F products is off by F half units at most; 16 are for the rounding of rows, lengths and their sums.
    error = 1.01 * (points.shape[1] + 16) * torch.finfo(dtype).eps / 2
    centre = others.mean(dim=0, dtype=torch.float64)
    chunk = max(EXACT_ELEMENTS // points.shape[1], 1)
    sets = (points, others)
    lengths, along = [], []
    for rows in sets:
        deviations = (part.double() - centre for part in rows.split(chunk))
        sums = [(part @ centre, part.square_().sum(dim=1)) for part in deviations]
        along.append(torch.cat([one for one, _ in sums]))
        lengths.append(torch.cat([one for _, one in sums]))
    _, exponent = math.frexp(math.sqrt(max(float(squared.max()) for squared in lengths)))
    scale = 2.0**-exponent
    results = []
    for rows, squared, one in zip(sets, lengths, along, strict=True):
        scaled = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            scaled[part] = (rows[part].double() - centre).mul_(scale)
        results.append(Rows(rows, centre, scale, scaled, squared * scale**2, one, error))
    return results[0], results[1]
