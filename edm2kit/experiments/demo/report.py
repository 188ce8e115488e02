"""The demo's table and picture, from the records and images that scripts/demo.sh produces."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from PIL import Image, ImageDraw, ImageFont

from edm2kit.cli import click_types as cli
from edm2kit.experiments.documents import checkout, markdown_table, write_parts
from edm2kit.torch_utils.files import atomic_write

METRICS = ("fd_lite0", "fd_random")  # the first that the records have is shown
FOLDER = Path("experiments", "demo")  # in the checkout: the published records and picture
RECORDS_NAME, PICTURE_NAME = "demo.json", "demo.png"
TITLES = {
    "real": "other real pictures",
    "unguided": "main network alone",
    "autoguided": "main network, autoguided",
}
_ZOOM = 2
_MARGIN = 12
_TITLE_HEIGHT = 34

Records = Mapping[str, Mapping[str, Any]]  # by the keys of TITLES


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records that `calculate_metrics.py --record` wrote to `folder`, by the keys of TITLES.

    Raises ValueError if one is missing, or if their numbers of images differ: such distances cannot be compared.
    """
    records = {}
    for name in TITLES:
        path = folder / f"{name}.json"
        if not path.exists():
            raise ValueError(f"{path} is missing. Run `bash scripts/demo.sh`, which writes it")
        records[name] = json.loads(path.read_text(encoding="utf-8"))
    counts = {name: record["num_images"] for name, record in records.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"the records in {folder} are of different numbers of images ({counts}) and cannot be compared. "
            "Delete them and run `bash scripts/demo.sh` again"
        )
    return records


def metric_of(records: Records) -> str:
    """The metric to show. Raises ValueError if the records have none in common."""
    for metric in METRICS:
        if all(metric in record["results"] for record in records.values()):
            return metric
    raise ValueError(f"the records have none of {', '.join(METRICS)}. Run `bash scripts/demo.sh`, which computes them")


def document_parts(records: Records) -> dict[str, str]:
    """The generated part of the demo's page, experiments/demo/README.md."""
    return {"demo": table(records)}


def table(records: Records) -> str:
    """Markdown table of the distance from other real pictures per record: mean, minimum and each set of seeds."""
    any_record, metric = records["autoguided"], metric_of(records)
    sets = len(any_record["results"][metric]["values"])
    rows = []
    for name, title in TITLES.items():
        found = records[name]["results"][metric]
        each = ", ".join(f"{value:.4g}" for value in found["values"].values())
        rows.append((title, f"{found['mean']:.4g}", f"{found['min']:.4g}", each))
    head = (f"{any_record['num_images']:,} images each", f"{metric}, mean of {sets}", "minimum", "each")
    return markdown_table(head, rows)


def picture(
    left: Sequence[Image.Image], right: Sequence[Image.Image], titles: tuple[str, str], columns: int, zoom: int = _ZOOM
) -> Image.Image:
    """Two grids of equally large images side by side, enlarged `zoom` times, each below its title."""
    side = left[0].width * zoom
    lines = -(-len(left) // columns)
    width, height = columns * side, lines * side
    sheet = Image.new("RGB", (2 * width + 3 * _MARGIN, height + _TITLE_HEIGHT + _MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    for part, (images, title) in enumerate(zip((left, right), titles, strict=True)):
        x0 = _MARGIN + part * (width + _MARGIN)
        pen.text((x0, _TITLE_HEIGHT // 2), title, "black", font, anchor="lm")
        for k, image in enumerate(images):
            line, column = divmod(k, columns)
            enlarged = image.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (x0 + column * side, _TITLE_HEIGHT + line * side))
    return sheet


def _first_images(folder: Path, count: int) -> list[Image.Image]:
    files = sorted(folder.rglob("*.png"))[:count]
    if len(files) < count:
        raise ValueError(f"{folder} has {len(files)} images, but the picture needs {count}. Lower --columns or --rows")
    return [Image.open(file) for file in files]


@click.command(cls=cli.Command)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="demo-out",
    show_default=True,
    help="Output folder of scripts/demo.sh",
)
@click.option("--columns", type=click.IntRange(min=1), default=10, show_default=True, help="Images per row")
@click.option("--rows", type=click.IntRange(min=1), default=8, show_default=True, help="Rows of images")
@click.option("--publish", is_flag=True, help="Also update experiments/demo/ in the checkout")
def main(out: Path, columns: int, rows: int, publish: bool) -> None:
    """Write OUT/demo.png and OUT/table.md from the images and records in OUT."""
    records = read_records(out)
    metric = metric_of(records)
    unguided, autoguided = (records[name]["results"][metric]["mean"] for name in ("unguided", "autoguided"))
    titles = (f"unguided: {metric} {unguided:.3g}", f"autoguided: {metric} {autoguided:.3g}")
    left, right = (_first_images(out / name, columns * rows) for name in ("unguided", "autoguided"))
    sheet = picture(left, right, titles, columns)
    _save_picture(sheet, out)
    with atomic_write(out / "table.md", "w") as file:
        file.write(table(records) + "\n")
    click.echo(f"{table(records)}\n\nWrote {out / PICTURE_NAME} and {out / 'table.md'}")
    if publish:
        folder = checkout() / FOLDER
        _save_picture(sheet, folder)
        with atomic_write(folder / RECORDS_NAME, "w") as file:
            json.dump(records, file, indent=1)
        write_parts(folder / "README.md", document_parts(records))


def _save_picture(sheet: Image.Image, folder: Path) -> None:
    with atomic_write(folder / PICTURE_NAME) as file:
        sheet.save(file, "PNG", optimize=True)


if __name__ == "__main__":
    main()
