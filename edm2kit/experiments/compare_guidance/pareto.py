"""The trade-offs of a comparison as a picture: distance against coverage at every weight, and against cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edm2kit.experiments.compare_guidance.report import REAL, Record, front, metric_of, trades
from edm2kit.torch_utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osv^D<>Ph*X"  # one more than there are colours, so that pairs repeat late
_SHOWN = 1.4  # distances up to so many times the best one: beyond, images are destroyed


def draw_trade_offs(record: Record, path: Path) -> None:
    """Write a PNG of two panels; the best trade-offs are joined by a line and named.

    On the left, distance against coverage: of the tuning images, a curve over the weights of each row. On the right,
    distance against multiply-adds per image: of the reported images, a point for each row at its best weight.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_coverage(left, record)
    _draw_cost(right, record)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)


def comparable_rows(record: Record) -> tuple[int, list[Any]]:
    """The number of images that weights were tuned on, and the rows whose values at every weight are of as many.

    Rows without weights to tune have values of the reported images only. If these were more, their distance is lower
    for that reason alone, so that the rows are left out.
    """
    rows = [row for row in record["rows"] if row["name"] != REAL.name]
    counts = {row["name"]: row["tuned_on"] or record["num_images"] for row in rows}
    number = next((row["tuned_on"] for row in rows if row["tuned_on"]), record["num_images"])
    return number, [row for row in rows if counts[row["name"]] == number]


def _draw_coverage(panel: "Axes", record: Record) -> None:
    metric = metric_of(record)
    number, rows = comparable_rows(record)
    everything: list[tuple[float, float, str]] = []
    for k, row in enumerate(rows):
        points = []
        for weight, results in _by_weight(row["tuning"] or row["points"]):
            coverage, distance = (_mean(results, name) for name in (f"{metric}.coverage", metric))
            points.append((coverage, distance))
            label = row["title"] if weight is None else f"{row['title']}, w {weight:g}"
            everything.append((coverage, distance, label))
        style: dict[str, Any] = {
            "marker": _MARKERS[k % len(_MARKERS)],
            "color": f"C{k % 10}",
            "ms": 4,
            "lw": 0.8,
            "alpha": 0.7,
        }
        panel.plot([x for x, _ in points], [y for _, y in points], label=row["title"], **style)
    best = min(distance for _, distance, _ in everything)
    near = [coverage for coverage, distance, _ in everything if distance <= _SHOWN * best]
    margin = 0.1 * (max(near) - min(near)) or 0.1
    panel.set_xlim(min(near) - margin, max(near) + margin)
    panel.set_ylim(best - 0.1 * (_SHOWN - 1) * best, _SHOWN * best)
    _join(panel, everything, front([(-x, y) for x, y, _ in everything]))
    panel.set_xlabel("coverage of real images")
    panel.set_ylabel(f"distance ({metric})")
    panel.set_title(f"at every weight, {number} images each (distances up to {_SHOWN:g} times the best)")
    # below the panel: inside, so many names would cover the curves
    panel.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)


def _draw_cost(panel: "Axes", record: Record) -> None:
    rows = [row for row in trades(record) if row.multiply_adds]
    points = [(row.multiply_adds or 0.0, row.distance, row.title) for row in rows]
    panel.scatter([x for x, *_ in points], [y for _, y, _ in points], color="0.6", s=18)
    panel.set_xscale("log")
    _join(panel, points, front([(x, y) for x, y, _ in points]))
    panel.set_xlabel("multiply-adds per image")
    panel.set_title(f"at the best weight, {record['num_images']} images each")


def _join(panel: "Axes", points: Sequence[tuple[float, float, str]], best: Sequence[int]) -> None:
    """A line through the points on the front, with their names."""
    panel.plot([points[k][0] for k in best], [points[k][1] for k in best], "k--", lw=1)
    for line, k in enumerate(best):
        x, y, name = points[k]
        place, _ = panel.transAxes.inverted().transform(panel.transData.transform((x, y)))
        on_the_right = place > 0.5  # then its name is on the left, so that it does not leave the panel
        label = panel.annotate(
            name,
            (x, y),
            fontsize=6.5,
            xytext=(-3 if on_the_right else 3, -8 - 7 * (line % 3)),  # so that names do not cover each other
            textcoords="offset points",
            ha="right" if on_the_right else "left",
        )
        label.set_in_layout(False)
    panel.grid(alpha=0.3)


def _by_weight(points: Sequence[Any]) -> list[tuple[float | None, list[Any]]]:
    """The results of each weight, over all seeds."""
    found: dict[float | None, list[Any]] = {}
    for point in points:
        found.setdefault(point["weight"], []).append(point["results"])
    return list(found.items())


def _mean(results: Sequence[Any], name: str) -> float:
    return sum(one[name] for one in results) / len(results)
