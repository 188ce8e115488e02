"""Compare guidance methods on your own networks: tune weights, report scores on other seeds, make a picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from edm2kit.cli import click_types as cli
from edm2kit.cli.generation import prepare
from edm2kit.cli.image_source import image_batches, open_images
from edm2kit.experiments.compare_guidance.cost import describe_student, measure_costs
from edm2kit.experiments.compare_guidance.measure import Scoring, best_weight, measure_real, measure_row, read_record
from edm2kit.experiments.compare_guidance.report import (
    DOCUMENT,
    FOLDER,
    METRIC,
    RECORD_NAME,
    collect,
    document_parts,
)
from edm2kit.experiments.compare_guidance.rows import ROWS_FILE, ComparisonRow, load_rows, rows_named
from edm2kit.experiments.compare_guidance.sheet import Strip, draw_sheet
from edm2kit.experiments.documents import checkout, write_parts
from edm2kit.metrics.scoring import image_features, make_scorer
from edm2kit.models.encoders import to_image
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.cache import fetch
from edm2kit.torch_utils.files import atomic_write, sha256_of, write_json

_TUNING_SEED = "1000000"  # far from the seeds of any report


class NamedFile(click.ParamType):
    """NAME=PATH of a file that rows name in braces, as a pair."""

    name = "name=path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, path = value.partition("=")
        if not equals:
            self.fail(f"{value!r} is not NAME=PATH. Write for example main=net.safetensors", param, ctx)
        if not Path(path).is_file():
            self.fail(f"{value!r}: the file {path} does not exist", param, ctx)
        return name, path


_row_options = cli.section(
    "Rows",
    click.option(
        "--network",
        "networks",
        metavar="NAME=PATH",
        type=NamedFile(),
        multiple=True,
        help="File that rows name in braces; give one per name",
    ),
    click.option(
        "--rows", "names", metavar="LIST", type=cli.Parsed(cli.split_names), help="Rows by name  [default: all]"
    ),
    click.option(
        "--rows-file",
        metavar="YAML",
        type=click.Path(path_type=Path, dir_okay=False),
        default=ROWS_FILE,
        show_default="those of the package",
        help="Definition of the rows",
    ),
    click.option(
        "--outdir",
        metavar="DIR",
        type=click.Path(path_type=Path, file_okay=False),
        default="runs/comparison",
        help="Folder of the records",
    ),
)
_batch = click.option("--batch", metavar="N", type=click.IntRange(min=1), default=50, help="Images per batch")
_device = click.option("--device", default="auto", help="auto, cuda, mps or cpu")
_reference_options = cli.section(
    "Reference",
    click.option("--ref", metavar="NPZ", required=True, help="Reference statistics, from calculate_metrics.py ref"),
    click.option("--real", metavar="PATH", required=True, help="Real images for precision, recall and coverage"),
)
_tuned_seeds = click.option(
    "--tuned-seed", "tuned", metavar="LIST", type=cli.IntRanges(), default=_TUNING_SEED, help="First seeds of `tune`"
)


def _image_options(num: int, seeds: str, *more: cli.Decorator) -> cli.Decorator:
    return cli.section(
        "Images",
        # torchrun reads --num as its own --numa-binding, unless a lone -- precedes the script
        click.option(
            "--num", "--num-images", metavar="N", type=click.IntRange(min=6), default=num, help="Images per value"
        ),
        click.option(
            "--seed",
            "seeds",
            metavar="LIST",
            type=cli.IntRanges(),
            default=seeds,
            help="First seed of each value, e.g. 10000,20000",
        ),
        *more,
        _batch,
        _device,
    )


@click.group(cls=cli.Group)
def main() -> None:
    """Compare guidance methods. Scores are kept in --outdir and never measured twice.

    \b
    common="--network main=... --network guide=... --ref reference.npz --real pictures.zip"
    python scripts/compare_guidance.py tune $common
    python scripts/compare_guidance.py report $common --fresh fresh
    python scripts/compare_guidance.py sheet --network main=... --network guide=...
    python scripts/compare_guidance.py table --network main=... --network guide=...
    """


@main.command()
@_row_options
@_reference_options
@_image_options(200, _TUNING_SEED)
def tune(outdir: Path, num: int, seeds: tuple[int, ...], device: str, **given: Any) -> None:
    """Score every row at each of its weights."""
    rows, networks = _take_rows(given)
    with dist.session(device) as picked:
        scoring = _scoring(picked, num, **given)
        for row in rows:
            measure_row(outdir / "tune" / f"{row.name}.json", row, networks, scoring, row.weights, seeds)


@main.command()
@_row_options
@_reference_options
@_image_options(
    400,
    "10000,20000",
    _tuned_seeds,
    click.option("--fresh", metavar="PATH", help="Other real images, to measure how far real is from real"),
)
def report(
    outdir: Path,
    num: int,
    seeds: tuple[int, ...],
    tuned: tuple[int, ...],
    fresh: str | None,
    device: str,
    **given: Any,
) -> None:
    """Score every row at its best weight, on other seeds than it was tuned on."""
    rows, networks = _take_rows(given)
    weights = {row.name: _best_weight(row, outdir, tuned) for row in rows}
    with dist.session(device) as picked:
        scoring = _scoring(picked, num, **given)
        if fresh is not None:
            measure_real(outdir / "report" / "real.json", open_images(fresh), scoring, range(len(seeds)))
        for row in rows:
            path = outdir / "report" / f"{row.name}.json"
            measure_row(path, row, networks, scoring, [weights[row.name]], seeds)


@main.command()
@_row_options
@cli.section(
    "Images",
    click.option("--rounds", metavar="N", type=click.IntRange(min=1), default=3, help="Rounds; the fastest counts"),
    _tuned_seeds,
    _batch,
    _device,
)
def cost(outdir: Path, batch: int, rounds: int, tuned: tuple[int, ...], device: str, **given: Any) -> None:
    """Time the rows at their best weights and count their multiply-adds. The machine should be idle otherwise."""
    rows, networks = _take_rows(given)
    with dist.session(device) as picked:
        generations = {
            row.name: prepare(row.request(_best_weight(row, outdir, tuned), networks), picked) for row in rows
        }
        found = measure_costs(generations, batch, rounds)
    for name, values in found["rows"].items():
        click.echo(f"{name}: {values['seconds']:.4f} s, {values['multiply_adds']:.3g} multiply-adds per image")
    write_json(outdir / "cost.json", found)


@main.command(name="table")
@_row_options
@cli.section(
    "Output",
    click.option(
        "--publish", is_flag=True, help="Also update experiments/compare_guidance/ and docs/guidance.md in the checkout"
    ),
)
def make_table(outdir: Path, publish: bool, **given: Any) -> None:
    """Print the table of all scores, and write its record to --outdir."""
    rows, networks = _take_rows(given)
    record = collect(rows, {row.name: row.cost(networks) for row in rows}, outdir)
    if (outdir / "cost.json").exists() and "student" in networks:
        record["costs"] = json.loads((outdir / "cost.json").read_text(encoding="utf-8"))
        record["student"] = describe_student(Path(networks["student"]))
    parts = document_parts(record)
    click.echo("\n\n".join(parts.values()))
    write_json(outdir / RECORD_NAME, record)
    if publish:
        write_json(checkout() / FOLDER / RECORD_NAME, record)
        write_parts(checkout() / DOCUMENT, parts)


@main.command()
@_row_options
@cli.section(
    "Images",
    click.option("--images", metavar="N", type=click.IntRange(min=1), default=4, help="Images per weight"),
    click.option(
        "--dest",
        metavar="PNG",
        type=click.Path(path_type=Path, dir_okay=False),
        help="The picture  [default: sheet.png in --outdir]",
    ),
    _device,
)
def sheet(outdir: Path, images: int, dest: Path | None, device: str, **given: Any) -> None:
    """Make one picture of every row at every weight, with seeds 0, 1, ..."""
    rows, networks = _take_rows(given)
    path = dest or outdir / "sheet.png"
    with dist.session(device) as picked:
        lines = []
        for row in rows:
            strips = []
            for weight in row.weights or (None,):
                generation = prepare(row.request(weight, networks, "--balanced"), picked)
                pixels = [one for batch in generation.batches(range(images), images) for one in batch.images.numpy()]
                title = "" if weight is None else f"w = {weight:g}"
                strips.append(Strip(title, [to_image(one) for one in pixels]))
            lines.append((row.title, strips))
        with atomic_write(path) as file:
            draw_sheet(lines).save(file, "PNG", optimize=True)
    click.echo(f"Wrote {path}")


def _take_rows(given: dict[str, Any]) -> tuple[list[ComparisonRow], Mapping[str, str]]:
    """Take rows and files out of the options: the rows whose files were all given, and the files by name."""
    names, networks = given.pop("names"), dict(given.pop("networks"))
    kept = []
    for row in rows_named(load_rows(given.pop("rows_file")), names):
        missing = [name for name in row.needs if name not in networks]
        if missing:
            dist.print0(f"{row.name} is skipped: it needs --network {missing[0]}=PATH")
        else:
            kept.append(row)
    if not kept:
        raise ValueError("no row is left. Name its networks with --network NAME=PATH")
    return kept, networks


def _scoring(device: torch.device, num: int, ref: str, real: str, batch: int) -> Scoring:
    scorer, source = make_scorer(fetch(ref), device, [METRIC]), open_images(real)
    if len(source) < num:
        raise ValueError(f"--real {real} has {len(source)} images, fewer than --num {num}")
    picked = torch.linspace(0, len(source) - 1, num).long().tolist()
    scorer = replace(scorer, real=image_features(image_batches(source, picked, batch, 1), scorer.detectors, device))
    identity = {"metric": METRIC, "reference_sha256": sha256_of(fetch(ref)), "real": f"{num} of {len(source)}"}
    return Scoring(scorer, identity, num, batch)


def _best_weight(row: ComparisonRow, outdir: Path, seeds: Sequence[int]) -> float | None:
    if not row.weights:
        return None
    return best_weight(row.name, read_record(outdir / "tune" / f"{row.name}.json"), row.weights, seeds, METRIC)


if __name__ == "__main__":
    main()
