"""The comparison's record, gathered from those of its rows, and its table, made from the record alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edm2kit.experiments.compare_guidance.measure import Point, read_record
from edm2kit.experiments.compare_guidance.rows import Row

METRIC = "fd_random"
SHARES = ("precision", "recall", "coverage")
REAL = Row("real", "real pictures, drawn anew", "")
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


def table(record: Record) -> str:
    """Markdown: rows at their best weights, nearest first, below real images; the mean of several sets, and each."""
    rows = sorted(record["rows"], key=lambda row: (row["name"] != REAL.name, _mean(row["points"], METRIC)))
    heads = [f"{record['num_images']} images each", "w", "of", "evaluations", METRIC, "each", *SHARES]
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---|---|---:|---|---:|---:|---:|"]
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
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(points: Sequence[Point], metric: str) -> float:
    return sum(point["results"][metric] for point in points) / len(points)


def cost_table(record: Record) -> str:
    """Markdown: what the rows whose cost was measured give for it, and what the student's training took."""
    costs, rows = record["costs"], {row["name"]: row for row in record["rows"]}
    lines = [f"| | {METRIC} | multiply-adds an image | seconds an image |", "|---|---:|---:|---:|"]
    for name, cost in costs["rows"].items():
        distance = f"{_mean(rows[name]['points'], METRIC):.3f}"
        lines.append(f"| {rows[name]['title']} | {distance} | {cost['multiply_adds']:.3g} | {cost['seconds']:.4f} |")
    teacher, training = record["student"]["teacher"]["guidance"], record["student"]["training"]
    guided = f"weight {teacher['weight']:g}" + ("" if teacher["interval"] is None else f", steps {_range(teacher)}")
    minutes = training["seconds"] / 60
    lines.append(
        f"\nThe student saw {training['nimg']:,} images in {minutes:.1f} minutes ({training['hardware']}); its teacher "
        f"guides with {guided}. Times: {costs['hardware']}, batches of {costs['batch']}."
    )
    return "\n".join(lines)


def _range(guidance: Mapping[str, Any]) -> str:
    return f"{guidance['steps'][0]} to {guidance['steps'][-1]}"
