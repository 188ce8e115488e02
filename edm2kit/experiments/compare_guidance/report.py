"""The comparison's record, collected from those of its rows, and its tables, made from that record alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edm2kit.experiments.compare_guidance.measure import Point, check_points, read_record
from edm2kit.experiments.compare_guidance.rows import ComparisonRow
from edm2kit.experiments.documents import markdown_table, read_object
from edm2kit.torch_utils.files import check_type

SHARES = ("precision", "recall", "coverage")
FOLDER = Path("experiments", "compare_guidance")  # in the checkout: the published record and picture
DOCUMENT = Path("docs", "guidance.md")
RECORD_NAME, PICTURE_NAME = "comparison.json", "pareto.png"
DISTILLATION_NAME = "distillation.json"  # an earlier comparison, with the student of scripts/distill.py
REAL = ComparisonRow("real", "other real pictures", "")
Record = Mapping[str, Any]


def collect(rows: Sequence[ComparisonRow], costs: Mapping[str, str], outdir: Path, about: str = "") -> dict[str, Any]:
    """One record of all rows with scores; `about` is a sentence on the networks.

    Raises ValueError if there are none, or if they cannot be compared.
    """
    found, settings = [], []
    for row in [REAL, *rows]:
        reported = read_record(outdir / "report" / f"{row.name}.json")
        if not reported["points"]:
            continue
        tuned = read_record(outdir / "tune" / f"{row.name}.json")
        settings.append({key: reported["asked"][key] for key in ("num_images", "metric", "reference_sha256", "real")})
        found.append(
            {
                "name": row.name,
                "title": row.title,
                "cost": costs.get(row.name, ""),
                "asked": reported["asked"],
                "tuned_on": None if tuned["asked"] is None else tuned["asked"]["num_images"],
                "tuning": tuned["points"],
                "points": reported["points"],
                "multiply_adds": reported.get("multiply_adds"),
            }
        )
    if not found:
        raise ValueError(f"{outdir} has no scores yet. Run `report` first")
    if any(one != settings[0] for one in settings):
        raise ValueError(
            f"the scores in {outdir} are of different numbers of images or different references and cannot be "
            "compared. Run `report` for all rows with the same options and another --outdir"
        )
    return {"about": about, "num_images": settings[0]["num_images"], "rows": found}


def load_collected(path: Path) -> dict[str, Any]:
    """A record that `collect` made. Raises ValueError, naming the file, if it is something else or damaged."""
    record = read_object(path)
    try:
        check_type(record.get("num_images"), int, "num_images")
        check_type(record.get("rows"), list[Mapping[str, Any]], "rows")
        for number, row in enumerate(record["rows"]):
            where = f"rows[{number}]"
            check_type(row.get("title"), str, f"{where}.title")
            check_type(row.get("asked"), Mapping[str, Any], f"{where}.asked")
            check_type(row["asked"].get("metric"), str, f"{where}.asked.metric")
            for part in ("points", "tuning"):
                check_points(row.get(part), f"{where}.{part}")
                for point in row[part]:
                    _check_results(point, row["asked"]["metric"], f"{where}.{part}")
            if not row["points"]:
                raise ValueError(f"{where}.points is empty")
        if not record["rows"]:
            raise ValueError("rows is empty")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Run `table` to write it again") from error
    return record


def _check_results(point: Point, metric: str, where: str) -> None:
    missing = [name for name in (metric, *(f"{metric}.{share}" for share in SHARES)) if name not in point["results"]]
    if missing:
        raise ValueError(f"{where} has no {missing[0]}")


def load_costs(path: Path) -> dict[str, Any]:
    """The record of `cost`. Raises ValueError, naming the file, if it is something else or damaged."""
    costs = read_object(path)
    try:
        for name, hint in (("rows", Mapping[str, Any]), ("hardware", str), ("batch", int)):
            check_type(costs.get(name), hint, name)
        for name, row in costs["rows"].items():
            check_type(row, Mapping[str, Any], f"rows.{name}")
            for key in ("seconds", "multiply_adds"):
                check_type(row.get(key), float, f"rows.{name}.{key}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Run `cost` to write it again") from error
    return costs


def metric_of(record: Record) -> str:
    """The detector whose distance was measured."""
    return record["rows"][0]["asked"]["metric"]


def document_parts(record: Record) -> dict[str, str]:
    """The parts of docs/guidance.md that come from the record, by name."""
    parts = {"comparison": score_table(record)}
    if record.get("about"):
        picture = f"![Distance against coverage and against cost](../{FOLDER.as_posix()}/{PICTURE_NAME})"
        parts["comparison"] = f"{record['about']}\n\n{picture}\n\n{parts['comparison']}"
    if "student" in record:
        parts["distillation"] = cost_table(record)
    return parts


def score_table(record: Record) -> str:
    """Markdown table of the rows at their best weights: real images first, then by distance."""
    metric, marks = metric_of(record), front_marks(record)
    counted = any(row.get("multiply_adds") for row in record["rows"])
    rows = []
    for row in sorted(record["rows"], key=lambda row: (row["name"] != REAL.name, _mean(row["points"], metric))):
        weight = row["points"][0]["weight"]
        tried = dict.fromkeys(point["weight"] for point in row["tuning"] if point["weight"] is not None)
        cells = [
            row["title"],
            "" if weight is None else f"{weight:g}",
            ", ".join(f"{one:g}" for one in tried),
            row["cost"],
            f"{_mean(row['points'], metric):.3f}",
            ", ".join(f"{point['results'][metric]:.3f}" for point in row["points"]),
            *(f"{_mean(row['points'], f'{metric}.{share}'):.2f}" for share in SHARES),
        ]
        if counted:
            adds = row.get("multiply_adds")
            cells += ["" if adds is None else f"{adds:.3g}", marks.get(row["name"], "")]
        rows.append(cells)
    head = [f"{record['num_images']} images each", "w", "of", "evaluations", metric, "each", *SHARES]
    if counted:
        head += ["multiply-adds per image", "best trade-off"]
    return markdown_table(head, rows, "lrllrlrrr" + "rl" * counted)


@dataclass(frozen=True)
class Trade:
    """A row at its best weight, as a point in two planes: its distance against 1 - coverage, and against its cost."""

    name: str
    title: str
    weight: float | None
    distance: float
    coverage: float
    multiply_adds: float | None


def trades(record: Record) -> list[Trade]:
    """Every row but real images at its best weight, on average over the seeds that are reported."""
    metric = metric_of(record)
    found: list[Trade] = []
    for row in record["rows"]:
        if row["name"] == REAL.name:
            continue
        distance, coverage = (_mean(row["points"], name) for name in (metric, f"{metric}.coverage"))
        weight, adds = row["points"][0]["weight"], row.get("multiply_adds")
        found.append(Trade(row["name"], row["title"], weight, distance, coverage, adds))
    return found


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The Pareto front: indices of the points that no other one beats in one value without losing in the other.

    Small values are better. In the order of the first value. Equal points are both on it.
    """
    best = float("inf")
    found: list[int] = []
    order = sorted(range(len(points)), key=lambda k: points[k])
    for k in order:
        if points[k][1] < best or (found and points[k] == points[found[-1]]):
            found.append(k)
            best = min(best, points[k][1])
    return found


def front_marks(record: Record) -> dict[str, str]:
    """Which trade-offs a row is among the best in, "coverage" or "cost" or both, by name."""
    rows = trades(record)
    counted = [row for row in rows if row.multiply_adds]
    marks: dict[str, list[str]] = {}
    for word, some, values in (
        ("coverage", rows, [(-row.coverage, row.distance) for row in rows]),
        ("cost", counted, [(row.multiply_adds or 0.0, row.distance) for row in counted]),
    ):
        for k in front(values):
            marks.setdefault(some[k].name, []).append(word)
    return {name: ", ".join(words) for name, words in marks.items()}


def _mean(points: Sequence[Point], metric: str) -> float:
    return sum(point["results"][metric] for point in points) / len(points)


def cost_table(record: Record) -> str:
    """Markdown table of the rows with measured cost, and a sentence on the training of the distilled network."""
    costs, metric = record["costs"], metric_of(record)
    by_name = {row["name"]: row for row in record["rows"]}
    rows = [
        (
            by_name[name]["title"],
            f"{_mean(by_name[name]['points'], metric):.3f}",
            f"{cost['multiply_adds']:.3g}",
            f"{cost['seconds']:.4f}",
        )
        for name, cost in costs["rows"].items()
        if name in by_name
    ]
    table = markdown_table(("", metric, "multiply-adds per image", "seconds per image"), rows, "lrrr")
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
