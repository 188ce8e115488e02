"""The comparison as one HTML page: the table, distance against weight, and a slider over every row's weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from edm2kit.data.image_files import contact_sheet
from edm2kit.experiments.compare_guidance.report import SHARES, metric_of
from edm2kit.experiments.compare_guidance.sheet import Strip
from edm2kit.experiments.pages import figures, page

NAME = "index.html"
_CURVES = 6  # in one figure


def write_page(lines: Sequence[tuple[str, Sequence[Strip]]], record: Mapping[str, Any] | None, path: Path) -> bool:
    """Write the page of (title, strips) as in `draw_sheet`, and of the record of scores if there is one.

    Returns False, and writes nothing, if no row generates without guidance: there is nothing to show images beside.
    """
    plain = [strips[0] for _, strips in lines if len(strips) == 1 and not strips[0].caption]
    if not plain:
        return False
    unguided = _sheet(plain[0])
    groups = []
    for title, strips in lines:
        if strips[0] is plain[0]:
            continue
        stops = [page.SliderStop(strip.caption or "no weight", _sheet(strip)) for strip in strips]
        groups.append(page.SliderGroup(title, unguided, stops))
    blocks = []
    if groups:
        blocks += [page.heading("The same seeds at every weight"), page.weight_slider(groups)]
    about = "edm2kit-compare"
    if record is not None:
        blocks += _scores(record)
        about = f"{about} · {record['num_images']} images per value"
    page.write_page(path, "Ways to guide, compared", blocks, about)
    return True


def _sheet(strip: Strip) -> Image.Image:
    columns = 2 if len(strip.images) > 1 else 1
    return contact_sheet([image.convert("RGB") for image in strip.images], columns)


def _scores(record: Mapping[str, Any]) -> list[str]:
    metric = metric_of(record)
    rows = []
    for row in record["rows"]:
        weight = row["points"][0]["weight"]
        values = [_mean(row, metric), *(_mean(row, f"{metric}.{share}") for share in SHARES)]
        rows.append([row["title"], "" if weight is None else f"{weight:g}", *(f"{value:.4g}" for value in values)])
    rows.sort(key=lambda cells: float(cells[2]))
    blocks = [
        page.heading("Scores at the best weight of each"),
        page.table(["", "weight", metric, *SHARES], rows, "lrrrrr"),
    ]
    curves = []
    for row in record["rows"]:
        points = sorted((p["weight"], p["results"][metric]) for p in row["tuning"] if p["weight"] is not None)
        if len(points) > 1:
            curves.append(figures.Curve(row["title"], [weight for weight, _ in points], [value for _, value in points]))
    for start in range(0, len(curves), _CURVES):
        chart = figures.line_chart(curves[start : start + _CURVES], "guidance weight", metric)
        blocks.append(page.figure(chart, f"{metric} while tuning, against the weight."))
    return blocks


def _mean(row: Mapping[str, Any], name: str) -> float:
    return sum(point["results"][name] for point in row["points"]) / len(row["points"])
