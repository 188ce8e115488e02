"""The walk of docs/own-images.md on real photos, and on portrait photos of a phone: what their record says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edm2kit.experiments.documents import markdown_table

FOLDER = Path("experiments/own_images")
RECORD_NAME = "record.json"


def document_parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of docs/own-images.md: commands, times and scores of the walk, and the portrait photos."""
    rows = [(f"`{step['command']}`", f"{step['seconds'] / 60:.1f} min") for step in record["steps"]]
    scores = " and ".join(f"{value:.1f} {name}" for name, value in record["scores"].items())
    total = sum(step["seconds"] for step in record["steps"]) / 60
    text = [
        f"{record['photos']} On {record['hardware']}, torch {record['torch']}, one thread. {record['load']}",
        markdown_table(("command as printed", "wall time"), rows, "lr"),
        f"Together {total:.0f} minutes, of which {record['cpu_seconds'] / 60:.0f} minutes of processor time. "
        + (f"{record['metric']} of {record['num']} images: {scores}." if scores else ""),
    ]
    return {"walk": "\n\n".join(part.strip() for part in text), "portrait": _portrait_text(record["portrait"])}


def _portrait_text(record: Mapping[str, Any]) -> str:
    """What became of photos that are stored sideways."""
    upright = [f"{found} of {count} {kind} images" for kind, (found, count) in record["upright"].items()]
    scores = " and ".join(f"{value:.1f} {name}" for name, value in record["scores"].items())
    minutes = sum(step["seconds"] for step in record["steps"]) / 60
    return (
        f"The same walk with {record['photos']}, and `--budget {record['budget']}`: {' and '.join(upright)} have the "
        f"sky above and the ground below. fd_lite0 of {record['num']} images: {scores}. {record['load']} All commands "
        f"together took {minutes:.0f} minutes."
    )
