"""A table of scores: what `edm2kit.sweep` returns, for notebooks, CSV, Markdown and as a figure."""

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edm2kit.experiments.documents import markdown_table
from edm2kit.experiments.pages import page
from edm2kit.experiments.pages.figures import Curve, Figure, line_chart
from edm2kit.experiments.tune.objective import direction
from edm2kit.torch_utils.files import atomic_write

UNGUIDED = "unguided"
SETTINGS = ("method", "guide", "age", "ema_main", "ema_guide", "sigma_lo", "sigma_hi", "weight")
_AXES = {
    "weight": "guidance weight",
    "ema_main": "EMA length of the main network",
    "ema_guide": "EMA length of the guide",
    "age": "training images of the guide",
}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class SweepTable:
    """One row per combination of settings: the columns SETTINGS, then a value per metric, and why there is none.

    `rows` are mappings by column; what does not apply is None: the guide of the unguided network, the interval of
    guidance at all noise levels. `num_images` were generated for each row, from the same seeds in all rows. Iterating
    yields the rows, so that `pandas.DataFrame(table)` works.

    Example: `print(table.to_markdown()); table.figure("fd_lite0").save("sweep.svg")`.
    """

    rows: tuple[Row, ...]
    metrics: tuple[str, ...]
    num_images: int

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __repr__(self) -> str:
        lines = [f"SweepTable: {len(self)} rows of {self.num_images:,} images, {', '.join(self.metrics)}"]
        failed = sum(row["error"] is not None for row in self.rows)
        if failed:
            lines.append(f"  {failed} without a value; see the column error")
        if failed < len(self):
            best = self.best()
            values = ", ".join(f"{name} {best[name]:.4g}" for name in self.metrics[:3])
            lines.append(f"  best by {self.metrics[0]}: {_title(best, SETTINGS)}: {values}")
        return "\n".join(lines)

    def best(self, metric: str | None = None) -> Row:
        """The row with the best value of a metric, by default the first one.

        Raises ValueError if the metric is unknown, has no better end, or was never measured.
        """
        metric = self._metric(metric)
        measured = [row for row in self.rows if row[metric] is not None]
        if not measured:
            raise ValueError(f"none of the {len(self)} rows has a value of {metric}: {self.rows[0]['error']}")
        return min(measured, key=lambda row: direction(metric) * row[metric])

    def _metric(self, metric: str | None) -> str:
        if metric is not None and metric not in self.metrics:
            raise ValueError(f"the table has no metric {metric!r}; it has {', '.join(self.metrics)}")
        return metric or self.metrics[0]

    def _columns(self) -> list[str]:
        intervals = [f"{name}_{end}" for name in self.metrics for end in ("low", "high")]
        return [*SETTINGS, *self.metrics, *(name for name in intervals if name in self.rows[0]), "error"]

    def to_csv(self, path: str | Path | None = None) -> str:
        """All columns as CSV, at full precision; also written to `path` if there is one. Raises OSError."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self._columns())
        writer.writerows([row.get(name) for name in self._columns()] for row in self.rows)
        if path is not None:
            with atomic_write(path, "w") as file:
                file.write(text.getvalue())
        return text.getvalue()

    def to_markdown(self) -> str:
        """A Markdown table of the columns that differ between rows; the best value of each metric is bold."""
        return markdown_table(*self._shown(lambda text: f"**{text}**"))

    def _repr_html_(self) -> str:
        return page.table(*self._shown(lambda text: f"{text} (best)"))

    def _shown(self, emphasise: Callable[[str], str]) -> tuple[list[str], list[list[str]], str]:
        """Head, rows and alignment of the columns that differ between rows."""
        columns = [name for name in SETTINGS if len({row[name] for row in self.rows}) > 1] or ["method"]
        best = {name: self.best(name) for name in self.metrics if self._has_best(name)}
        failed = any(row["error"] is not None for row in self.rows)
        lines = []
        for row in self.rows:
            line = [_cell(row[name]) for name in columns]
            for name in self.metrics:
                value = "" if row[name] is None else f"{row[name]:.4g}"
                if row[name] is not None and f"{name}_low" in row:
                    value += " ({:.4g} to {:.4g})".format(row[f"{name}_low"], row[f"{name}_high"])
                line.append(emphasise(value) if best.get(name) is row else value)
            lines.append([*line, *([row["error"] or ""] if failed else [])])
        align = "".join("l" if name in ("method", "guide") else "r" for name in columns) + "r" * len(self.metrics)
        return [*columns, *self.metrics, *(["error"] if failed else [])], lines, align + ("l" if failed else "")

    def _has_best(self, metric: str) -> bool:
        try:
            self.best(metric)
        except ValueError:
            return False
        return True

    def figure(self, metric: str | None = None, x: str = "weight") -> Figure:
        """A metric against "weight", "ema_main", "ema_guide" or "age", a curve per combination of the other settings.

        The unguided network is a point of each curve against the weight, and a dotted line otherwise. The band is the
        95% interval, if it was asked for. Raises ValueError if no row has both numbers.

        Example: `table.figure("fd_lite0", x="ema_guide").save("ema.svg")`
        """
        if x not in _AXES:
            raise ValueError(f"a figure against {x!r} is not possible; choose one of {', '.join(_AXES)}")
        metric = self._metric(metric)
        rows = [row for row in self.rows if row[metric] is not None]
        plain = [row for row in rows if row["method"] == UNGUIDED]
        guided = [row for row in rows if row["method"] != UNGUIDED]
        others = [name for name in SETTINGS if name != x and len({row[name] for row in guided}) > 1]
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in guided:
            groups.setdefault(tuple(row[name] for name in others), []).append(row)
        if x == "weight":
            for group in groups.values():
                group += [row for row in plain if row["ema_main"] == group[0]["ema_main"]]
        references = []
        if x == "ema_main" and plain:
            groups[(UNGUIDED,)] = plain
        elif x != "weight":
            many = len({row["ema_main"] for row in plain}) > 1
            references = [(row[metric], _title(row, ["method", *["ema_main"] * many])) for row in plain]
        curves = []
        for group in groups.values():
            title = _title(group[0], others or ["method"])
            points = sorted((row for row in group if row[x] is not None), key=lambda row: row[x])
            if points:
                curves.append(self._curve(points, x, metric, title))
        if not curves:
            raise ValueError(f"no row has both {x} and a value of {metric}, so there is nothing to draw")
        y_title = f"{metric} ({self.num_images:,} images)"
        return Figure(line_chart(curves, _AXES[x], y_title, references=references))

    def _curve(self, points: Sequence[Row], x: str, metric: str, title: str) -> Curve:
        low: tuple[float, ...] = ()
        high: tuple[float, ...] = ()
        if f"{metric}_low" in points[0]:
            low = tuple(row[f"{metric}_low"] for row in points)
            high = tuple(row[f"{metric}_high"] for row in points)
        return Curve(title, [row[x] for row in points], [row[metric] for row in points], low, high)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _title(row: Row, columns: Sequence[str]) -> str:
    """Settings in words: "autoguidance, guide small, EMA of guide 0.05, w 2"."""
    words = {
        "method": "{}", "guide": "guide {}", "age": "at {:,} images", "ema_main": "EMA {:g}",
        "ema_guide": "EMA of guide {:g}", "weight": "w {:g}",
    }  # fmt: skip
    parts = [words[name].format(row[name]) for name in words if name in columns and row[name] is not None]
    if "sigma_lo" in columns or "sigma_hi" in columns:
        low, high = row["sigma_lo"], row["sigma_hi"]
        if low is not None:
            parts.append(f"sigma in ({low:g}, {high:g}]")
        elif row["method"] != UNGUIDED and len(columns) < len(SETTINGS):
            parts.append("all sigma")
    return ", ".join(parts)


def finite_or_none(value: float) -> float | None:
    """A value for the table; what is not finite has none."""
    return value if math.isfinite(value) else None
