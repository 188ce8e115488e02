"""The generated parts of docs/reproduction.md, and the record of all plans that they come from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edm2kit.experiments.documents import markdown_table
from edm2kit.experiments.paper_tables.networks import PublishedNetwork, profile_fit_of
from edm2kit.experiments.paper_tables.plan import cell_cost
from edm2kit.experiments.paper_tables.tables import Table, load_table, table_names
from edm2kit.torch_utils.files import provenance

RECORD = Path("experiments", "paper_tables", "plans.json")  # in the checkout
IMAGES = 3 * 50_000  # per value, as published
_DENSE_NIMG = 8 << 20  # training itself stores a snapshot every 8Mi images
_TFLOPS = 100
_HOURS = f"GPU-hours at {_TFLOPS} Tflop/s"


def make_record(command: str) -> dict[str, Any]:
    """Cost and files of every cell of every table, and how well networks can be rebuilt. Downloads nothing."""
    tables: dict[str, Any] = {}
    rebuilt: dict[str, Any] = {}
    for name in table_names():
        table = load_table(name)
        tables[name] = _table_record(table)
        for cell in table.cells():
            for network in cell.networks:
                if network.fit is not None:
                    rebuilt[network.name] = fit_record(network)
    return {"command": command, **provenance(), "images": IMAGES, "tables": tables, "rebuilt": rebuilt}


def _table_record(table: Table) -> dict[str, Any]:
    sizes: dict[str, int] = {}  # by URL: cells share files
    cells = []
    for cell in table.cells():
        cost = cell_cost(cell, table.sampler)
        sizes |= {file.url: file.num_bytes or 0 for file in cost.files}
        urls = {url for network in cell.networks for url in network.urls}
        cells.append(
            {
                "name": cell.name,
                "published": cell.value,
                "networks": [network.name for network in cell.networks],
                "network_files": len(urls),
                "network_bytes": sum(sizes[url] for url in urls),
                "evaluations": [cost.net_evaluations, cost.gnet_evaluations],
                "multiply_adds": cost.multiply_adds,
            }
        )
    return {
        "bytes": sum(sizes.values()),
        "bytes_of_raw_snapshots": sum(size for url, size in sizes.items() if "/raw-snapshots/" in url),
        "cells": cells,
    }


def fit_record(network: PublishedNetwork) -> dict[str, Any]:
    """How well a network that is not published can be rebuilt, and how well training's own snapshots could.

    Raises ValueError if the network is published.
    """
    if network.fit is None:
        raise ValueError(f"{network.name} is one published file; nothing has to be rebuilt")
    dense_times = tuple(range(network.nimg, 0, -_DENSE_NIMG))[::-1]
    return {
        "snapshots": len(network.urls),
        "error": network.fit.error,
        "width": network.fit.ema_std,
        "error_of_dense": profile_fit_of(dense_times, network.nimg, network.ema_std).error,
    }


def document_parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of docs/reproduction.md by name."""
    parts = {"totals": _totals_table(record), "rebuilt": _fit_table(record["rebuilt"])}
    for name, table in record["tables"].items():
        parts[name] = _cell_table(table["cells"])
    return parts


def _totals_table(record: Mapping[str, Any]) -> str:
    rows = []
    for name, table in record["tables"].items():
        multiply_adds = sum(cell["multiply_adds"] for cell in table["cells"]) * record["images"]
        rows.append(
            (
                f"`{name}`",
                f"{len(table['cells'])}",
                f"{table['bytes'] / 1e9:.1f} GB",
                f"{table['bytes_of_raw_snapshots'] / 1e9:.1f} GB",
                f"{multiply_adds:.3g}",
                _hours(multiply_adds),
            )
        )
    return markdown_table(("table", "values", "downloads", "of these raw snapshots", "multiply-adds", _HOURS), rows)


def _cell_table(cells: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            f"`{cell['name']}`",
            f"{cell['published']:g}",
            " + ".join(f"`{name}`" for name in cell["networks"]),
            " + ".join(map(str, cell["evaluations"])),
            f"{cell['network_bytes'] / 1e9:.1f} GB in {cell['network_files']}",
            _hours(cell["multiply_adds"] * IMAGES),
        )
        for cell in cells
    ]
    return markdown_table(("cell", "published", "networks", "evaluations", "network files", _HOURS), rows)


def _fit_table(rebuilt: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, fit in sorted(rebuilt.items(), key=lambda item: -item[1]["error"]):
        width = "none" if fit["width"] is None else f"{fit['width']:.4f}"
        rows.append((f"`{name}`", f"{fit['snapshots']}", f"{fit['error']:.2%}", width, f"{fit['error_of_dense']:.2%}"))
    head = (
        "network",
        "raw snapshots used",
        "profile error",
        "resulting EMA length",
        "error with a snapshot every 8Mi images",
    )
    return markdown_table(head, rows)


def _hours(multiply_adds: float) -> str:
    return f"{2 * multiply_adds / (_TFLOPS * 1e12) / 3600:.3g}"
