"""The tables in docs/reproduction.md, from a record of what the plans say."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edm2kit.experiments.documents import markdown_table
from edm2kit.experiments.paper_tables.plan import Need, need_of
from edm2kit.experiments.paper_tables.raw_snapshots import fit
from edm2kit.experiments.paper_tables.tables import Network, load_table, table_names
from edm2kit.torch_utils.provenance import provenance

RECORD = Path("experiments", "paper_tables", "plans.json")  # in the checkout
IMAGES = 3 * 50_000  # of each value, as published
_DENSE_NIMG = 8 << 20  # how often training itself stores a snapshot
_TFLOPS = 100
_HOURS = f"GPU-hours at {_TFLOPS} Tflop/s"
_RAW = "/raw-snapshots/"


def make_record(command: str) -> dict[str, Any]:
    """Costs and files of every cell of every table, and how well networks can be rebuilt; downloads nothing."""
    tables, networks = {}, {}
    for name in table_names():
        table = load_table(name)
        needs = [need_of(cell, table.sampler) for cell in table.cells()]
        files = {download.url: download.num_bytes or 0 for need in needs for download in need.downloads}
        tables[name] = {
            "bytes": sum(files.values()),
            "bytes_of_raw_snapshots": sum(size for url, size in files.items() if _RAW in url),
            "cells": [_cell(need) for need in needs],
        }
        networks |= {network.name: network for need in needs for network in need.cell.networks if network.fit}
    rebuilt = {name: _rebuilt(network) for name, network in networks.items()}
    return {"command": command, **provenance(), "images": IMAGES, "tables": tables, "rebuilt": rebuilt}


def _cell(need: Need) -> dict[str, Any]:
    networks = {url for network in need.cell.networks for url in network.urls}
    return {
        "name": need.cell.name,
        "published": need.cell.value,
        "networks": [network.name for network in need.cell.networks],
        "network_files": len(networks),
        "network_bytes": sum({d.url: d.num_bytes or 0 for d in need.downloads if d.url in networks}.values()),
        "evaluations": [need.net_evaluations, need.gnet_evaluations],
        "multiply_adds": need.multiply_adds,
    }


def _rebuilt(network: Network) -> dict[str, Any]:
    error, width = network.fit
    dense = tuple(range(network.nimg, 0, -_DENSE_NIMG))[::-1]
    return {
        "snapshots": len(network.urls),
        "error": error,
        "width": width,
        "error_of_dense": fit(dense, network.nimg, network.ema_std)[0],
    }


def document_parts(record: Mapping[str, Any]) -> dict[str, str]:
    """Markdown by the names of the places in the document."""
    return {
        "totals": _totals(record),
        **{name: _cells(table["cells"]) for name, table in record["tables"].items()},
        "rebuilt": _networks(record["rebuilt"]),
    }


def _totals(record: Mapping[str, Any]) -> str:
    rows = []
    for name, table in record["tables"].items():
        multiply_adds = sum(cell["multiply_adds"] for cell in table["cells"]) * record["images"]
        sizes = (f"{table[key] / 1e9:.1f} GB" for key in ("bytes", "bytes_of_raw_snapshots"))
        rows.append((f"`{name}`", f"{len(table['cells'])}", *sizes, f"{multiply_adds:.3g}", _hours(multiply_adds)))
    return markdown_table(("table", "values", "downloads", "raw snapshots among them", "multiply-adds", _HOURS), rows)


def _cells(cells: Sequence[Mapping[str, Any]]) -> str:
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
    return markdown_table(("cell", "published", "networks", "evaluations", "files of networks", _HOURS), rows)


def _networks(rebuilt: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            f"`{name}`",
            f"{one['snapshots']}",
            f"{one['error']:.2%}",
            "none" if one["width"] is None else f"{one['width']:.4f}",
            f"{one['error_of_dense']:.2%}",
        )
        for name, one in sorted(rebuilt.items(), key=lambda item: -item[1]["error"])
    ]
    head = (
        "network",
        "raw snapshots used",
        "profile error",
        "EMA length it has",
        "error with a snapshot every 8Mi images",
    )
    return markdown_table(head, rows)


def _hours(multiply_adds: float) -> str:
    return f"{2 * multiply_adds / (_TFLOPS * 1e12) / 3600:.3g}"
