"""Plots of records: how cost grows, how steps scale."""

from pathlib import Path
from typing import Any

from benchmarks.growth import UNITS
from edm2kit.torch_utils.files import atomic_write

_WAYS = {"evaluation": ("one evaluation", "C0", "o"), "training": ("a training step", "C1", "s")}


def growth_plot(records: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot images per second along every axis in `records` (by job); a panel without a record says so."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.6), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    growth = records.get("growth")
    for panel, axis in zip(panels, UNITS, strict=False):
        panel.set_title(UNITS[axis], fontsize=10)
        if growth is None:
            _absent(panel, "growth")
            continue
        rows = growth["axes"][axis]
        for way, (label, color, marker) in _WAYS.items():
            values = [row[f"{way}_images_per_sec"] for row in rows]
            panel.loglog([row[axis] for row in rows], values, color=color, marker=marker, label=label)
        if axis != "batch":
            middle = len(rows) // 2
            scale = rows[middle]["training_images_per_sec"] * rows[middle]["multiply_adds"]
            panel.loglog(
                [row[axis] for row in rows],
                [scale / row["multiply_adds"] for row in rows],
                "k:",
                linewidth=1,
                label="as multiply-adds",
            )
        panel.set_xticks([row[axis] for row in rows], [str(row[axis]) for row in rows])
        _label_log_axis(panel, "images per second")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    _rank_panel(panels[3], records.get("scaling"))
    _memory_panel(panels[4], records.get("memory"))
    _output_panel(panels[5], records)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)


def _absent(panel: Any, job: str) -> None:
    panel.text(0.5, 0.5, f"no record of {job}", ha="center", va="center", transform=panel.transAxes)
    panel.set_xticks([])
    panel.set_yticks([])


def _label_log_axis(panel: Any, label: str) -> None:
    from matplotlib.ticker import LogLocator

    panel.minorticks_off()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_ylabel(label)


def _rank_panel(panel: Any, record: dict[str, Any] | None) -> None:
    panel.set_title("ranks of this machine, training", fontsize=10)
    if record is None:
        _absent(panel, "scaling")
        return
    batch, seconds = record["batch"], record["step_sec"]
    bars = {"one process": batch / seconds["alone"], "two independent": 2 * batch / seconds["independent"]}
    bars["two ranks"] = 2 * batch / seconds["ranks"]
    drawn = panel.bar(list(bars), list(bars.values()), color=["C7", "C0", "C1"], width=0.6)
    panel.bar_label(drawn, fmt="%.2f", fontsize=9)
    panel.set_ylabel("images per second")
    panel.margins(y=0.15)


def _memory_panel(panel: Any, record: dict[str, Any] | None) -> None:
    panel.set_title("memory of training: forecast and measured", fontsize=10)
    if record is None:
        _absent(panel, "memory")
        return
    rows = record["rows"]
    places = range(len(rows))
    for shift, key, color in ((-0.2, "forecast_bytes", "C0"), (0.2, "measured_bytes", "C1")):
        values = [row[key] / 1e9 for row in rows]
        panel.bar([p + shift for p in places], values, width=0.38, color=color, label=key.removesuffix("_bytes"))
    panel.set_xticks(list(places), [row["name"].replace(", ", "\n").replace(" + ", " +\n") for row in rows], fontsize=7)
    panel.set_ylabel("GB")
    panel.legend(fontsize=8)


def _output_panel(panel: Any, records: dict[str, dict[str, Any]]) -> None:
    """Seconds against the number of outputs, from all records of EMA reconstruction."""
    panel.set_title("EMA outputs of one reconstruction", fontsize=10)
    points = ema_points(records)
    if not points:
        _absent(panel, "EMA reconstruction")
        return
    for way in dict.fromkeys(way for way, _, _ in points):
        chosen = sorted((count, seconds) for name, count, seconds in points if name == way)
        panel.loglog(*zip(*chosen, strict=True), marker="o", label=way)
    ticks = sorted({count for _, count, _ in points})
    panel.set_xticks(ticks, [str(count) for count in ticks])
    _label_log_axis(panel, "seconds")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def ema_points(records: dict[str, dict[str, Any]]) -> list[tuple[str, int, float]]:
    """(way, outputs, median seconds) of every record with a number of `outputs` in its notes."""
    return [
        (way, int(record["notes"]["outputs"]), row["median_sec"])
        for record in records.values()
        if str(record.get("notes", {}).get("outputs", "")).isdigit()
        for way, row in record["contenders"].items()
    ]
