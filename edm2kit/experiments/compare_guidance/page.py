"""The comparison's record, gathered from those of its rows, and its table, made from the record alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edm2kit.experiments.compare_guidance.measure import Point, read_record
from edm2kit.experiments.compare_guidance.rows import Row
from edm2kit.experiments.documents import markdown_table

METRIC = "fd_random"
FOLDER = Path("experiments", "compare_guidance")  # in the checkout: the published record and picture
DOCUMENT = Path("docs", "guidance.md")
RECORD_NAME = "comparison.json"
SHARES = ("precision", "recall", "coverage")
REAL = Row("real", "other real pictures", "")
Record = Mapping[str, Any]


def gather(rows: Sequence[Row], costs: Mapping[str, str], outdir: Path) -> Record:
    """One record of all rows that were reported; ValueError where there are none, or their numbers do not compare."""
    found, asked = [], []
    for row in [REAL, *rows]:
        reported = read_record(outdir / "report" / f"{row.name}.json")
        if not reported["points"]:
            continue
        tuned = read_record(outdir / "tune" / f"{row.name}.json")
        asked.append({key: reported["asked"][key] for key in ("num_images", "reference_sha256", "real")})
        found.append(
            {
                "name": row.name,
                "title": row.title,
                "cost": costs.get(row.name, ""),
                "asked": reported["asked"],
                "tuned_on": None if tuned["asked"] is None else tuned["asked"]["num_images"],
                "tuning": tuned["points"],
                "points": reported["points"],
            }
        )
    if not found:
        raise ValueError(f"{outdir} holds no scores; run `report` first")
    if any(one != asked[0] for one in asked):
        raise ValueError(f"the scores in {outdir} are of different numbers of images or references: do not compare")
    return {"num_images": asked[0]["num_images"], "rows": found}


def document_parts(record: Record) -> dict[str, str]:
    """The parts of docs/guidance.md that the record fills, by name."""
    parts = {"comparison": table(record)}
    if "student" in record:
        parts["distillation"] = cost_table(record)
    return parts


def table(record: Record) -> str:
    """Markdown: rows at their best weights, nearest first, below real images; the mean of several sets, and each."""
    rows = sorted(record["rows"], key=lambda row: (row["name"] != REAL.name, _mean(row["points"], METRIC)))
    heads = [f"{record['num_images']} images each", "w", "of", "evaluations", METRIC, "each", *SHARES]
    lines = []
    for row in rows:
        weight, tried = row["points"][0]["weight"], dict.fromkeys(point["weight"] for point in row["tuning"])
        each = ", ".join(f"{point['results'][METRIC]:.3f}" for point in row["points"])
        cells = [
            row["title"],
            "" if weight is None else f"{weight:g}",
            ", ".join(f"{one:g}" for one in tried if one is not None),
            row["cost"],
            f"{_mean(row['points'], METRIC):.3f}",
            each,
            *(f"{_mean(row['points'], f'{METRIC}.{share}'):.2f}" for share in SHARES),
        ]
        lines.append(cells)
    return markdown_table(heads, lines, "lrllrlrrr")


def _mean(points: Sequence[Point], metric: str) -> float:
    return sum(point["results"][metric] for point in points) / len(points)


def cost_table(record: Record) -> str:
    """Markdown: what the rows whose cost was measured give for it, and what the student's training took."""
    costs = record["costs"]
    by_name = {row["name"]: row for row in record["rows"]}
    rows = [
        (
            by_name[name]["title"],
            f"{_mean(by_name[name]['points'], METRIC):.3f}",
            f"{cost['multiply_adds']:.3g}",
            f"{cost['seconds']:.4f}",
        )
        for name, cost in costs["rows"].items()
    ]
    table = markdown_table(("", METRIC, "multiply-adds per image", "seconds per image"), rows, "lrrr")
    teacher, training = record["student"]["teacher"]["guidance"], record["student"]["training"]
    guided = f"weight {teacher['weight']:g}"
    if teacher["interval"] is not None:
        guided += f" in steps {teacher['steps'][0]} to {teacher['steps'][-1]}"
    minutes = training["seconds"] / 60
    return (
        f"{table}\n\n"
        f"The student saw {training['nimg']:,} images in {minutes:.1f} minutes ({training['hardware']}). Its teacher "
        f"guides with {guided}. Times: {costs['hardware']}, batches of {costs['batch']}."
    )
