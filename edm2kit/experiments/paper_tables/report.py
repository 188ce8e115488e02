"""Published and measured values side by side, from the records of `measure_cell` alone."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edm2kit.experiments.documents import markdown_table, read_object
from edm2kit.experiments.paper_tables.run import describe, read_record
from edm2kit.experiments.paper_tables.tables import Cell, Table, TableRow

PUBLISHED_NUM, PUBLISHED_SEEDS = 50_000, 3
Line = Mapping[str, str]  # column -> text
Record = Mapping[str, Any]


def lines_of(table: Table, outdir: Path) -> Sequence[Line]:
    """One line per cell; columns that no cell uses are left out.

    Raises ValueError if a record is damaged or belongs to another table.
    """
    lines = []
    for row in table.rows:
        for cell in row.cells:
            record = _read(table, cell, outdir)
            lines.append(_line(table, row, cell, record))
    for column in list(lines[0]):
        texts = {line[column] for line in lines}
        if texts == {""}:
            for line in lines:
                del line[column]
    return lines


def notes_of(table: Table, outdir: Path) -> list[str]:
    """What a reader has to know besides the numbers."""
    notes = [f"{row.group}, {row.setting}: {row.note}." for row in table.rows if row.note]
    for network in [network for cell in table.cells() for network in cell.networks]:
        if network.fit is not None:
            notes.append(
                f"{network.name} is not published. It was rebuilt from {len(network.urls)} raw snapshots; relative "
                f"error of the EMA profile: {network.fit.error:.2g}."
            )
    for cell in table.cells():
        record = _read(table, cell, outdir)
        if record is not None:
            notes += _comparison_notes(record)
    return list(dict.fromkeys(notes))


def _comparison_notes(record: Record) -> list[str]:
    """Reasons why measured values differ from the published ones."""
    notes = []
    if record["asked"]["num_images"] != PUBLISHED_NUM:
        notes.append("Published values are of 50,000 images. Values of other numbers cannot be compared with them.")
    if 0 < len(record["runs"]) < PUBLISHED_SEEDS:
        notes.append("Published values are the minimum of three. The minimum of fewer is larger on average.")
    if "settings" in record and record["settings"]["device"] != "cuda":
        notes.append("Published images used CUDA random numbers. On other devices seeds give other images.")
    return notes


def markdown(table: Table, lines: Sequence[Line], notes: Sequence[str]) -> str:
    """The report as Markdown."""
    values = markdown_table(list(lines[0]), [list(line.values()) for line in lines])
    listed = "\n".join(f"- {note}" for note in notes)
    return "\n\n".join([f"# {table.title}", table.source, values, listed]) + "\n"


def html_page(table: Table, lines: Sequence[Line], notes: Sequence[str]) -> str:
    """The report as a self-contained page."""
    title = html.escape(table.title)
    head = "".join(f"<th>{html.escape(column)}</th>" for column in lines[0])
    body = []
    for line in lines:
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in line.values())
        body.append(f"<tr>{cells}</tr>")
    rows = "\n".join(body)
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        "<style>body{font-family:sans-serif}table{border-collapse:collapse}"
        "td,th{border-bottom:1px solid #ccc;padding:.3em .6em;text-align:left}</style></head>\n"
        f"<body><h1>{title}</h1><p>{html.escape(table.source)}</p>\n<table>\n<tr>{head}</tr>\n{rows}\n</table>\n"
        f"<ul>{listed}</ul></body></html>\n"
    )


def _read(table: Table, cell: Cell, outdir: Path) -> Record | None:
    path = outdir / f"{cell.name}.json"
    if not path.exists():
        return None
    try:
        num = read_object(path)["asked"]["num_images"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it to measure this cell again") from error
    return read_record(path, describe(table, cell, num))


def _line(table: Table, row: TableRow, cell: Cell, record: Record | None) -> dict[str, str]:
    runs = [] if record is None else [record["runs"][first] for first in sorted(record["runs"], key=int)]
    return {
        "group": row.group,
        "setting": row.setting,
        "metric": cell.metric,
        **_value_columns(cell, runs),
        **_setting_columns(table, cell),
        **_origin_columns(runs),
    }


def _value_columns(cell: Cell, runs: Sequence[Record]) -> Line:
    columns = {"published": f"{cell.value:g}", "minimum": "", "mean": "", "each": "", "difference": ""}
    values = [run["value"] for run in runs]
    if values:
        columns["minimum"] = f"{min(values):.4g}"
        columns["mean"] = f"{sum(values) / len(values):.4g}"
        columns["each"] = ", ".join(f"{value:.4g}" for value in values)
        columns["difference"] = f"{min(values) - cell.value:+.3g}"
    return columns


def _setting_columns(table: Table, cell: Cell) -> Line:
    choice = cell.guidance
    columns = {"network": cell.net.name, "guide": "", "method": "", "weight": "", "interval": ""}
    if cell.gnet is not None:
        columns["guide"] = cell.gnet.name
    if choice.method not in ("none", "autoguidance"):
        columns["method"] = choice.method
    if choice.method != "none":
        columns["weight"] = f"{choice.weight:g}"
    if choice.interval is not None:
        columns["interval"] = "({:g}, {:g}]".format(*choice.interval)
    for other in table.cells():
        columns |= dict.fromkeys(other.guidance.options, "")
    for name, value in choice.options.items():
        if isinstance(value, tuple):
            columns[name] = ",".join(map(str, value))
        elif value is not None:  # None is what the method usually does
            columns[name] = str(value)
    return columns


def _origin_columns(runs: Sequence[Record]) -> Line:
    if not runs:
        return {"images": "", "seeds": "", "hardware": "", "commit": ""}
    seeds, hardware, commits = [], [], []
    for run in runs:
        seeds.append(f"{run['first_seed']}-{run['first_seed'] + run['num_images'] - 1}")
        for maker in run["made_by"]:
            hardware.append(f"{maker['processes']} x {maker['hardware']}")
            commits.append(maker["commit"][:12] + maker["commit"][40:])  # short, with "+changes" if there were any
    return {
        "images": str(runs[0]["num_images"]),
        "seeds": ", ".join(seeds),
        "hardware": "; ".join(dict.fromkeys(hardware)),
        "commit": "; ".join(dict.fromkeys(commits)),
    }
