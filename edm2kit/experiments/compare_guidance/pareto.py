"""The trade-offs of a comparison as a picture: distance against coverage at every weight, and against cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edm2kit.experiments.compare_guidance.report import REAL, Record, front, metric_of, trades
from edm2kit.torch_utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osv^D<>Ph*"


def draw_trade_offs(record: Record, path: Path) -> None:
    """Write a PNG of two panels; the best trade-offs are joined by a line and named.

    On the left, distance against coverage: of the tuning images, a curve over the weights of each row. On the right,
    distance against multiply-adds per image: of the reported images, a point for each row at its best weight.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_coverage(left, record)
    _draw_cost(right, record)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)


def _draw_coverage(panel: "Axes", record: Record) -> None:
    metric = metric_of(record)
    everything: list[tuple[float, float, str]] = []
    for k, row in enumerate(row for row in record["rows"] if row["name"] != REAL.name):
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
    _join(panel, everything, front([(-x, y) for x, y, _ in everything]))
    panel.set_xlabel("coverage of real images")
    panel.set_ylabel(f"distance ({metric})")
    panel.set_title(f"at every weight, {record['rows'][-1]['tuned_on'] or record['num_images']} images each")
    panel.legend(fontsize=6, ncols=2)


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
    for k in best:
        x, y, name = points[k]
        place, _ = panel.transAxes.inverted().transform(panel.transData.transform((x, y)))
        on_the_right = place > 0.5  # then its name is on the left, so that it does not leave the panel
        label = panel.annotate(
            name,
            (x, y),
            fontsize=6.5,
            xytext=(-3 if on_the_right else 3, -8),
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
