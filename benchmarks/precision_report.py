"""What docs/performance.md says about images in half precision, from the record of `benchmarks.precision`."""

from collections.abc import Mapping
from typing import Any

from benchmarks.precision import FLOAT32, OTHER_SEEDS
from edm2kit.experiments.documents import markdown_table

Record = Mapping[str, Any]


def precision_text(record: Record, machine: str) -> str:
    """Images in faster ways beside those in float32 and beside other seeds; `machine` says where they were made."""
    detector, num = record["detector"], record["num"]
    rows, verdicts = [], []
    for preset, ways in record["presets"].items():
        for way, row in ways.items():
            apart = ["" if row[key] is None else f"{row[key]:.2f}" for key in ("from_fp32", "from_others")]
            real = ""
            if "from_real" in row:
                value, low, high = row["from_real"]
                real = f"{value:.1f} ({low:.1f} to {high:.1f})"
            rows.append((preset, way, f"{row['pixels']:.2f}", *apart, real))
            if way not in (FLOAT32, OTHER_SEEDS):
                verdicts.append(verdict(f"{preset}, {way}", row, ways[FLOAT32], ways[OTHER_SEEDS]))
    head = (
        "preset",
        "way",
        "pixels",
        f"{detector} from fp32",
        f"{detector} from fp32, other seeds",
        f"{detector} from real images" if record["reference"] else "real images: not measured",
    )
    introduction = (
        f"{num} images a set, by networks of the package. All ways but one use the same seeds. Pixels: mean absolute "
        f"difference from the fp32 image of the same seed, in grey levels. Intervals are 95%. A distance between sets "
        f"of so few images is large; only sets of the same size compare. {machine}{record.get('how', '')}"
    )
    return "\n\n".join([introduction, markdown_table(head, rows), "\n".join(verdicts)])


def verdict(name: str, row: Record, exact: Record, others: Record) -> str:
    """Whether a faster way changes less than other seeds do: image by image, as a set, and as a score."""
    smaller = {
        "the images": row["pixels"] < others["pixels"],
        "the set": row["from_fp32"] < others["from_fp32"],
    }
    if "from_real" in row:
        value, low, high = exact["from_real"]
        change, other_change = abs(row["from_real"][0] - value), abs(others["from_real"][0] - value)
        smaller["the distance from real images"] = change <= other_change or low <= row["from_real"][0] <= high
    failed = [what for what, is_smaller in smaller.items() if not is_smaller]
    if failed:
        return f"- {name}: {' and '.join(failed)} **changed more** than with other seeds."
    pixels, distance = row["pixels"] / others["pixels"], row["from_fp32"] / others["from_fp32"]
    return (
        f"- {name}: no worse than other seeds; {pixels:.1%} of their difference in pixels, {distance:.1%} of the "
        "distance between their sets."
    )
