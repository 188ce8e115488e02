"""The demo's picture and table, made from the records that its commands left: see scripts/demo.sh."""

import json
from pathlib import Path

import click
from PIL import Image, ImageDraw, ImageFont

from edm2kit.cli import click_types as cli
from edm2kit.experiments.documents import fill_in
from edm2kit.torch_utils.files import atomic_write

METRIC = "fd_random"
ROWS = {  # record -> how the table names it
    "real": "real pictures, drawn anew",
    "unguided": "the main network alone",
    "autoguided": "the main network, autoguided",
}
_ZOOM = 2
_MARGIN = 12
_TITLE_HEIGHT = 34


def read_records(folder: Path) -> dict[str, dict]:
    """The records `calculate_metrics.py --record` wrote, by the keys of ROWS.

    Raises ValueError for one that is missing, and where two count different numbers of images: such distances do not
    compare.
    """
    records = {}
    for name in ROWS:
        path = folder / f"{name}.json"
        if not path.exists():
            raise ValueError(f"{path} is missing; run `bash scripts/demo.sh`, which writes it")
        records[name] = json.loads(path.read_text())
    counts = {name: record["num_images"] for name, record in records.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the records in {folder} count different numbers of images and do not compare: {counts}")
    return records


def table(records: dict[str, dict]) -> str:
    """A Markdown table: distance from the training set by row, the least and the mean of several sets of seeds."""
    any_record = records["autoguided"]
    sets = len(any_record["results"][METRIC]["values"])
    count = f"{any_record['num_images']:,} images each"
    lines = [f"| {count} | {METRIC}, mean of {sets} | least | each |", "|---|---|---|---|"]
    for name, title in ROWS.items():
        found = records[name]["results"][METRIC]
        each = ", ".join(f"{value:.4g}" for value in found["values"].values())
        lines.append(f"| {title} | {found['mean']:.4g} | {found['min']:.4g} | {each} |")
    return "\n".join(lines)


def picture(left: list[Image.Image], right: list[Image.Image], titles: tuple[str, str], columns: int) -> Image.Image:
    """Two grids of images of one size side by side, enlarged, each under its title."""
    side = left[0].width * _ZOOM
    width, height = columns * side, -(-len(left) // columns) * side
    sheet = Image.new("RGB", (2 * width + 3 * _MARGIN, height + _TITLE_HEIGHT + _MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    for part, (images, title) in enumerate(zip((left, right), titles, strict=True)):
        x0 = _MARGIN + part * (width + _MARGIN)
        pen.text((x0, _TITLE_HEIGHT // 2), title, "black", font, anchor="lm")
        for k, image in enumerate(images):
            enlarged = image.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (x0 + k % columns * side, _TITLE_HEIGHT + k // columns * side))
    return sheet


def _first_images(folder: Path, count: int) -> list[Image.Image]:
    files = sorted(folder.rglob("*.png"))[:count]
    if len(files) < count:
        raise ValueError(f"{folder} holds {len(files)} images; the picture needs {count}")
    return [Image.open(file) for file in files]


@click.command(cls=cli.Command)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default="demo-out", show_default=True)
@click.option("--columns", type=click.IntRange(min=1), default=10, show_default=True, help="Pictures per row.")
@click.option("--rows", type=click.IntRange(min=1), default=8, show_default=True, help="Rows of pictures.")
@click.option("--publish", is_flag=True, help="Also put picture, records and table into docs/ and README.md.")
def main(out: Path, columns: int, rows: int, publish: bool) -> None:
    """Make OUT/demo.png and OUT/table.md from the images and records in OUT."""
    records = read_records(out)
    distances = {name: record["results"][METRIC]["mean"] for name, record in records.items()}
    titles = (f"unguided: {METRIC} {distances['unguided']:.3g}", f"autoguided: {METRIC} {distances['autoguided']:.3g}")
    grids = [_first_images(out / name, columns * rows) for name in ("unguided", "autoguided")]
    folders = [out, Path(__file__).resolve().parents[2] / "docs"][: 1 + publish]
    for folder in folders:
        with atomic_write(folder / "demo.png") as file:
            picture(*grids, titles, columns).save(file, "PNG", optimize=True)
    with atomic_write(out / "table.md", "w") as file:
        file.write(table(records) + "\n")
    if publish:
        _publish(records, folders[1])
    click.echo(f"{table(records)}\n\nThe picture: {out / 'demo.png'}")


def _publish(records: dict[str, dict], docs: Path) -> None:
    with atomic_write(docs / "demo.json", "w") as file:
        json.dump(records, file, indent=1)
    readme = docs.parent / "README.md"
    text = fill_in(readme.read_text(encoding="utf-8"), "demo", table(records))
    with atomic_write(readme, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
