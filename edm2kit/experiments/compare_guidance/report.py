"""The comparison's record, collected from those of its rows, and its tables, made from that record alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edm2kit.experiments.compare_guidance.measure import Point, read_record
from edm2kit.experiments.compare_guidance.rows import ComparisonRow
from edm2kit.experiments.documents import markdown_table

METRIC = "fd_random"
SHARES = ("precision", "recall", "coverage")
FOLDER = Path("experiments", "compare_guidance")  # in the checkout: the published record and picture
DOCUMENT = Path("docs", "guidance.md")
RECORD_NAME = "comparison.json"
REAL = ComparisonRow("real", "other real pictures", "")
Record = Mapping[str, Any]


def collect(rows: Sequence[ComparisonRow], costs: Mapping[str, str], outdir: Path) -> dict[str, Any]:
    """One record of all rows with scores. Raises ValueError if there are none, or if they cannot be compared."""
    found, settings = [], []
    for row in [REAL, *rows]:
        reported = read_record(outdir / "report" / f"{row.name}.json")
        if not reported["points"]:
            continue
        tuned = read_record(outdir / "tune" / f"{row.name}.json")
        settings.append({key: reported["asked"][key] for key in ("num_images", "reference_sha256", "real")})
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
        raise ValueError(f"{outdir} has no scores yet. Run `report` first")
    if any(one != settings[0] for one in settings):
        raise ValueError(
            f"the scores in {outdir} are of different numbers of images or different references and cannot be "
            "compared. Run `report` for all rows with the same options and another --outdir"
        )
    return {"num_images": settings[0]["num_images"], "rows": found}


def document_parts(record: Record) -> dict[str, str]:
    """The parts of docs/guidance.md that come from the record, by name."""
    parts = {"comparison": score_table(record)}
    if "student" in record:
        parts["distillation"] = cost_table(record)
    return parts


def score_table(record: Record) -> str:
    """Markdown table of the rows at their best weights: real images first, then by distance."""
    rows = []
    for row in sorted(record["rows"], key=lambda row: (row["name"] != REAL.name, _mean(row["points"], METRIC))):
        weight = row["points"][0]["weight"]
        tried = dict.fromkeys(point["weight"] for point in row["tuning"] if point["weight"] is not None)
        rows.append(
            [
                row["title"],
                "" if weight is None else f"{weight:g}",
                ", ".join(f"{one:g}" for one in tried),
                row["cost"],
                f"{_mean(row['points'], METRIC):.3f}",
                ", ".join(f"{point['results'][METRIC]:.3f}" for point in row["points"]),
                *(f"{_mean(row['points'], f'{METRIC}.{share}'):.2f}" for share in SHARES),
            ]
        )
    head = [f"{record['num_images']} images each", "w", "of", "evaluations", METRIC, "each", *SHARES]
    return markdown_table(head, rows, "lrllrlrrr")


def _mean(points: Sequence[Point], metric: str) -> float:
    return sum(point["results"][metric] for point in points) / len(points)


def cost_table(record: Record) -> str:
    """Markdown table of the rows with measured cost, and a sentence on the training of the distilled network."""
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
