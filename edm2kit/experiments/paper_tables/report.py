"""Published and measured values side by side, from the records of `run` alone."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edm2kit.experiments.paper_tables.run import How, describe, read_record
from edm2kit.experiments.paper_tables.tables import Cell, Row, Table

PUBLISHED_NUM, PUBLISHED_SEEDS = 50_000, 3
Line = Mapping[str, str]


def lines_of(table: Table, outdir: Path) -> list[Line]:
    """One line per cell, each a mapping from column to text; a column is there if some cell uses it.

    Raises ValueError where a record is damaged or of another table.
    """
    lines = [_line(table, row, cell, _record(table, cell, outdir)) for row in table.rows for cell in row.cells]
    used = [column for column in lines[0] if any(line[column] for line in lines)]
    return [{column: line[column] for column in used} for line in lines]


def notes_of(table: Table, outdir: Path) -> list[str]:
    """What a reader must know besides the numbers."""
    records = [r for row in table.rows for cell in row.cells if (r := _record(table, cell, outdir)) is not None]
    notes = [f"{row.group}, {row.setting}: {row.note}." for row in table.rows if row.note]
    for network in {network.name: network for cell in table.cells() for network in cell.networks}.values():
        if network.fit_error is not None:
            notes.append(
                f"{network.name} is not published: rebuilt from {len(network.urls)} raw snapshots, EMA profile off by "
                f"{network.fit_error:.2g} of its norm."
            )
    if any(record["asked"]["num_images"] != PUBLISHED_NUM for record in records):
        notes.append("The published values are of 50,000 images; values of other numbers do not compare with them.")
    if any(0 < len(record["runs"]) < PUBLISHED_SEEDS for record in records):
        notes.append("The published values are the least of three; the least of fewer is larger on average.")
    if any(record["settings"]["device"] != "cuda" for record in records if "settings" in record):
        notes.append(
            "The published seeds were drawn by CUDA generators; on other devices the same seeds are other images."
        )
    return notes


def markdown(table: Table, lines: Sequence[Line], notes: Sequence[str]) -> str:
    """The report as Markdown."""
    columns = list(lines[0])
    rows = [columns, ["---"] * len(columns), *([_escape(line[column]) for column in columns] for line in lines)]
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([f"# {table.title}", table.source, body, "\n".join(f"- {note}" for note in notes)]) + "\n"


def html_page(table: Table, lines: Sequence[Line], notes: Sequence[str]) -> str:
    """The report as a page of its own."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in lines[0])
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line.values()) + "</tr>" for line in lines
    )
    title, listed = html.escape(table.title), "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        "<style>body{font-family:sans-serif}table{border-collapse:collapse}"
        "td,th{border-bottom:1px solid #ccc;padding:.3em .6em;text-align:left}</style></head>\n"
        f"<body><h1>{title}</h1><p>{html.escape(table.source)}</p>\n<table>\n<tr>{head}</tr>\n{rows}\n</table>\n"
        f"<ul>{listed}</ul></body></html>\n"
    )


def _record(table: Table, cell: Cell, outdir: Path) -> Mapping[str, Any] | None:
    path = outdir / f"{cell.name}.json"
    if not path.exists():
        return None
    try:
        num = json.loads(path.read_text(encoding="utf-8"))["asked"]["num_images"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to measure this cell anew") from error
    return read_record(path, describe(table, cell, How(num, 0, 0, 0)))


def _line(table: Table, row: Row, cell: Cell, record: Mapping[str, Any] | None) -> Line:
    runs = [] if record is None else [record["runs"][key] for key in sorted(record["runs"], key=int)]
    values = [run["value"] for run in runs]
    made_by = [maker for run in runs for maker in run["made_by"]]
    choice = cell.guidance
    line = {
        "group": row.group,
        "setting": row.setting,
        "metric": cell.metric,
        "published": f"{cell.value:g}",
        "least": f"{min(values):.4g}" if values else "",
        "mean": f"{sum(values) / len(values):.4g}" if values else "",
        "all": ", ".join(f"{value:.4g}" for value in values),
        "difference": f"{min(values) - cell.value:+.3g}" if values else "",
        "network": cell.net.name,
        "guide": cell.gnet.name if cell.gnet else "",
        "method": "" if choice.method in ("none", "pair") else choice.method,
        "weight": "" if choice.method == "none" else f"{choice.weight:g}",
        "interval": "({:g}, {:g}]".format(*choice.interval) if choice.interval else "",
    }
    line |= {name: "" for other in table.cells() for name in other.guidance.options}
    line |= {name: _text(value) for name, value in choice.options.items()}
    return line | {
        "images": str(record["asked"]["num_images"]) if values else "",
        "seeds": ", ".join(f"{run['first_seed']}-{run['first_seed'] + run['num_images'] - 1}" for run in runs),
        "hardware": _all(f"{maker['processes']} x {maker['hardware']}" for maker in made_by),
        "commit": _all(maker["commit"][:12] + maker["commit"][40:] for maker in made_by),
    }


def _text(value: Any) -> str:
    if value is None:  # what the method usually does
        return ""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _all(texts: Any) -> str:
    return "; ".join(dict.fromkeys(texts))


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
