"""The walk of docs/own-images.md on real photos: what its record says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edm2kit.experiments.documents import markdown_table

FOLDER = Path("experiments/own_images")
RECORD_NAME = "record.json"


def document_parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated part of docs/own-images.md: the commands of the walk, their times, and the scores."""
    rows = [(f"`{step['command']}`", f"{step['seconds'] / 60:.1f} min") for step in record["steps"]]
    scores = " and ".join(f"{value:.1f} {name}" for name, value in record["scores"].items())
    total = sum(step["seconds"] for step in record["steps"]) / 60
    text = [
        f"{record['photos']} On {record['hardware']}, torch {record['torch']}, one thread. {record['load']}",
        markdown_table(("command as printed", "wall time"), rows, "lr"),
        f"Together {total:.0f} minutes, of which {record['cpu_seconds'] / 60:.0f} minutes of processor time. "
        + (f"{record['metric']} of {record['num']} images: {scores}." if scores else ""),
    ]
    return {"walk": "\n\n".join(part.strip() for part in text)}
