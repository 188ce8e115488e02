"""Results of several runs of one measurement: table and record."""

from collections.abc import Mapping
from typing import Any

Runs = Mapping[str, Mapping[str, float]]  # run -> metric -> value


def summary(runs: Runs) -> dict[str, dict[str, Any]]:
    """Least, mean and every value by metric; papers report the least of three."""
    metrics = next(iter(runs.values()))
    columns = {metric: [values[metric] for values in runs.values()] for metric in metrics}
    return {
        metric: {"min": min(values), "mean": sum(values) / len(values), "values": dict(zip(runs, values, strict=True))}
        for metric, values in columns.items()
    }


def table(runs: Runs) -> str:
    """One line per run and, of several, their least and mean; one column per metric."""
    found = summary(runs)
    rows = {name: [f"{value:.6g}" for value in values.values()] for name, values in runs.items()}
    if len(runs) > 1:
        rows |= {key: [f"{column[key]:.6g}" for column in found.values()] for key in ("min", "mean")}
    first = max(map(len, rows))
    widths = [max(len(metric), *(len(cells[k]) for cells in rows.values())) for k, metric in enumerate(found)]
    lines = [["", *found], *([name, *cells] for name, cells in rows.items())]
    return "\n".join(
        "  ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], widths, strict=True))])
        for line in lines
    )
