"""Compare guidance methods on your own networks: tune weights, report scores on other seeds, make a picture."""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("compare")  # before torch is imported

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from edm2kit.cli import click_types as cli
from edm2kit.cli.generation import prepare
from edm2kit.cli.image_source import image_batches, open_images, pixels_sha256
from edm2kit.cli.output_kinds import sheet_notes
from edm2kit.experiments.compare_guidance.cost import describe_student, measure_costs
from edm2kit.experiments.compare_guidance.measure import (
    Scoring,
    best_weight,
    measure_cost,
    measure_real,
    measure_row,
    read_record,
)
from edm2kit.experiments.compare_guidance.page import NAME as PAGE_NAME
from edm2kit.experiments.compare_guidance.page import write_page
from edm2kit.experiments.compare_guidance.pareto import draw_trade_offs
from edm2kit.experiments.compare_guidance.report import (
    DOCUMENT,
    FOLDER,
    PICTURE_NAME,
    RECORD_NAME,
    collect,
    document_parts,
    load_collected,
    load_costs,
)
from edm2kit.experiments.compare_guidance.rows import (
    ROWS_FILE,
    Comparison,
    ComparisonRow,
    ImageSet,
    load_comparison,
    rows_named,
)
from edm2kit.experiments.compare_guidance.sheet import Strip, draw_sheet
from edm2kit.experiments.documents import checkout, write_parts
from edm2kit.metrics.scoring import image_features, make_scorer
from edm2kit.models.encoders import to_image
from edm2kit.snapshots.run_folder import newest_of_folders
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.cache import fetch
from edm2kit.torch_utils.files import atomic_write, sha256_of, write_json


class NamedFile(click.ParamType):
    """NAME=PATH of a file that rows name in braces, as a pair."""

    name = "name=path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, path = value.partition("=")
        if not equals or not path:
            self.fail(f"{value!r:.60} is not NAME=PATH. Write for example main=net.safetensors", param, ctx)
        if Path(path).is_dir():
            try:
                path = newest_of_folders({name: path})[name]
            except ValueError as error:
                self.fail(str(error), param, ctx)
        if not path.startswith("diffusers:") and not Path(path).is_file():
            self.fail(f"{value!r:.60}: the file {path} does not exist", param, ctx)
        return name, path


_row_options = cli.section(
    "Rows",
    click.option(
        "--network",
        "networks",
        metavar="NAME=PATH",
        type=NamedFile(),
        multiple=True,
        help="File or run folder that rows name in braces; give one per name",
    ),
    click.option(
        "--rows", "names", metavar="LIST", type=cli.Parsed(cli.split_names), help="Rows by name  [default: all]"
    ),
    click.option(
        "--rows-file",
        metavar="YAML",
        type=click.Path(path_type=Path, dir_okay=False),
        default=ROWS_FILE,
        show_default=False,
        help="The comparison: its rows, detector and numbers of images  [default: that of the package]",
    ),
    click.option(
        "--outdir",
        metavar="DIR",
        type=cli.OutputFolder(),
        default="runs/comparison",
        help="Folder of the records",
    ),
)
_batch = click.option("--batch", metavar="N", type=click.IntRange(min=1), default=50, help="Images per batch")
_device = cli.device_option()
_reference_options = cli.section(
    "Reference",
    click.option("--ref", metavar="NPZ", required=True, help="Reference statistics, from calculate_metrics.py ref"),
    click.option("--real", metavar="PATH", required=True, help="Real images for precision, recall and coverage"),
)
_THEIR_DEFAULT = "  [default: that of --rows-file]"
_tuned_seeds = click.option(
    "--tuned-seed",
    "tuned",
    metavar="LIST",
    type=cli.IntRanges(),
    help=f"First seeds of `tune`{_THEIR_DEFAULT}",
)
_fresh = click.option("--fresh", metavar="PATH", help="Other real images, to measure how far real is from real")


def _image_options(*more: cli.Decorator) -> cli.Decorator:
    return cli.section(
        "Images",
        # torchrun reads --num as its own --numa-binding, unless a lone -- precedes the script
        click.option(
            "--num",
            "--num-images",
            metavar="N",
            type=click.IntRange(min=6),
            help=f"Images per value{_THEIR_DEFAULT}",
        ),
        click.option(
            "--seed",
            "seeds",
            metavar="LIST",
            type=cli.IntRanges(),
            help=f"First seed of each value, such as 10000,20000{_THEIR_DEFAULT}",
        ),
        *more,
        _batch,
        _device,
        cli.timeout_option(),
    )


@click.group(cls=cli.Group)
def main() -> None:
    """Compare guidance methods. Scores are kept in --outdir and never measured twice.

    \b
    common="--network main=... --network guide=... --ref reference.npz --real pictures.zip"
    python scripts/compare_guidance.py run $common       # tune, report and table; resumes
    python scripts/compare_guidance.py tune $common
    python scripts/compare_guidance.py report $common --fresh fresh
    python scripts/compare_guidance.py sheet --network main=... --network guide=...
    python scripts/compare_guidance.py table --network main=... --network guide=...
    """


@main.command()
@_row_options
@_reference_options
@cli.section("Images", _fresh, _batch, _device, cli.timeout_option())
def run(outdir: Path, fresh: str | None, device: str, **given: Any) -> None:
    """Tune and report row by row, with the images that --rows-file says; then write the table and the picture.

    Each score is kept as soon as it is measured: if it is stopped, the same command resumes it. Rows that the networks
    cannot generate, for example those that change attention where there is none, are skipped with the reason.
    """
    comparison, rows, networks = _take_rows(given)
    with dist.session(device) as picked:
        tuning = _scoring(picked, comparison.metric, comparison.tune.images, **given)
        reporting = _scoring(picked, comparison.metric, comparison.report.images, **given)
        if fresh is not None:
            _report_real(outdir, fresh, reporting, comparison.report.seeds)
        rows = [row for row in rows if _can_generate(row, networks, picked)]
        if not rows:
            raise ValueError("no row is left: the networks can generate none of them")
        for row in rows:
            _tune(outdir, row, networks, tuning, comparison.tune.seeds)
            weight = _best_weight(row, outdir, comparison.tune.seeds, comparison.metric)
            _report(outdir, row, networks, reporting, comparison.report.seeds, weight)
        if dist.rank() == 0:
            _write_table(outdir, comparison, rows, networks)


@main.command()
@_row_options
@_reference_options
@_image_options()
def tune(outdir: Path, num: int | None, seeds: tuple[int, ...] | None, device: str, **given: Any) -> None:
    """Score every row at each of its weights."""
    comparison, rows, networks = _take_rows(given)
    images = _images(comparison.tune, num, seeds)
    with dist.session(device) as picked:
        scoring = _scoring(picked, comparison.metric, images.images, **given)
        for row in rows:
            _tune(outdir, row, networks, scoring, images.seeds)


@main.command()
@_row_options
@_reference_options
@_image_options(_tuned_seeds, _fresh)
def report(
    outdir: Path,
    num: int | None,
    seeds: tuple[int, ...] | None,
    tuned: tuple[int, ...] | None,
    fresh: str | None,
    device: str,
    **given: Any,
) -> None:
    """Score every row at its best weight, on other seeds than it was tuned on."""
    comparison, rows, networks = _take_rows(given)
    images = _images(comparison.report, num, seeds)
    tuned = tuned or comparison.tune.seeds
    weights = {row.name: _best_weight(row, outdir, tuned, comparison.metric) for row in rows}
    with dist.session(device) as picked:
        scoring = _scoring(picked, comparison.metric, images.images, **given)
        if fresh is not None:
            _report_real(outdir, fresh, scoring, images.seeds)
        for row in rows:
            _report(outdir, row, networks, scoring, images.seeds, weights[row.name])


@main.command()
@_row_options
@cli.section(
    "Images",
    click.option("--rounds", metavar="N", type=click.IntRange(min=1), default=3, help="Rounds; the fastest counts"),
    _tuned_seeds,
    _batch,
    _device,
    cli.timeout_option(),
)
def cost(outdir: Path, batch: int, rounds: int, tuned: tuple[int, ...] | None, device: str, **given: Any) -> None:
    """Time the rows at their best weights and count their multiply-adds. The machine should be idle otherwise."""
    comparison, rows, networks = _take_rows(given)
    tuned = tuned or comparison.tune.seeds
    with dist.session(device) as picked:
        generations = {}
        for row in rows:
            weight = _best_weight(row, outdir, tuned, comparison.metric)
            generations[row.name] = prepare(row.request(weight, networks), picked)
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
    """Print the table of all scores, and write its record and a picture of the trade-offs to --outdir."""
    comparison, rows, networks = _take_rows(given)
    record = _write_table(outdir, comparison, rows, networks)
    if publish:
        write_json(checkout() / FOLDER / RECORD_NAME, record)
        draw_trade_offs(record, checkout() / FOLDER / PICTURE_NAME)
        write_parts(checkout() / DOCUMENT, document_parts(record))


@main.command()
@_row_options
@cli.section(
    "Images",
    click.option("--images", metavar="N", type=click.IntRange(min=1), default=4, help="Images per weight"),
    click.option(
        "--dest",
        metavar="PNG",
        type=cli.OutputFile("contact sheet"),
        help="The picture  [default: sheet.png in --outdir]",
    ),
    _device,
    cli.timeout_option(),
)
def sheet(outdir: Path, images: int, dest: Path | None, device: str, **given: Any) -> None:
    """Make one picture of every row at every weight, with seeds 0, 1, ...; and a page with a slider over the weight."""
    _, rows, networks = _take_rows(given)
    path = dest or outdir / "sheet.png"
    with dist.session(device) as picked:
        lines = []
        for row in rows:
            if not _can_generate(row, networks, picked):
                continue
            strips = []
            for weight in row.weights or (None,):
                generation = prepare(row.request(weight, networks, "--balanced"), picked)
                pixels = [one for batch in generation.batches(range(images), images) for one in batch.images]
                title = "" if weight is None else f"w = {weight:g}"
                strips.append(Strip(title, [to_image(one.cpu().numpy()) for one in pixels]))
            lines.append((row.title, strips))
        with atomic_write(path) as file:
            draw_sheet(lines).save(file, "PNG", optimize=True, pnginfo=sheet_notes())
    click.echo(f"Wrote {path}")
    record_path, page_path = outdir / RECORD_NAME, path.with_name(PAGE_NAME)
    record = load_collected(record_path) if record_path.exists() else None
    if write_page(lines, record, page_path):
        click.echo(f"Wrote {page_path}")


def _can_generate(row: ComparisonRow, networks: Mapping[str, str], device: torch.device) -> bool:
    """Whether the row's method fits its networks; prints the reason if it does not."""
    try:
        prepare(row.request(row.weights[0] if row.weights else None, networks), device)
    except ValueError as error:
        dist.print0(f"{row.name} is skipped: {error}")
        return False
    return True


def _tune(
    outdir: Path, row: ComparisonRow, networks: Mapping[str, str], scoring: Scoring, seeds: Sequence[int]
) -> None:
    measure_row(outdir / "tune" / f"{row.name}.json", row, networks, scoring, row.weights, seeds)


def _report(
    outdir: Path,
    row: ComparisonRow,
    networks: Mapping[str, str],
    scoring: Scoring,
    seeds: Sequence[int],
    weight: float | None,
) -> None:
    path = outdir / "report" / f"{row.name}.json"
    measure_row(path, row, networks, scoring, [weight], seeds)
    measure_cost(path, row, networks, scoring.scorer.device)


def _report_real(outdir: Path, fresh: str, scoring: Scoring, seeds: Sequence[int]) -> None:
    measure_real(outdir / "report" / "real.json", open_images(fresh), scoring, range(len(seeds)))


def _write_table(
    outdir: Path, comparison: Comparison, rows: Sequence[ComparisonRow], networks: Mapping[str, str]
) -> dict[str, Any]:
    """Print the table of what was measured, and write record and picture to `outdir`; returns the record."""
    record = collect(rows, {row.name: row.cost(networks) for row in rows}, outdir, comparison.about)
    if (outdir / "cost.json").exists() and "student" in networks:
        record["costs"] = load_costs(outdir / "cost.json")
        record["student"] = describe_student(Path(networks["student"]))
    click.echo(dist.printable("\n\n".join(document_parts(record).values())))
    write_json(outdir / RECORD_NAME, record)
    draw_trade_offs(record, outdir / PICTURE_NAME)
    return record


def _take_rows(given: dict[str, Any]) -> tuple[Comparison, list[ComparisonRow], Mapping[str, str]]:
    """Take rows and files out of the options: the comparison, its rows whose files were all given, files by name."""
    names, files = given.pop("names"), given.pop("networks")
    networks = dict(files)
    for name, path in files:
        if networks[name] != path:
            raise ValueError(f"--network names {name} twice: {path} and {networks[name]}. Give one file per name")
    comparison = load_comparison(given.pop("rows_file"))
    kept = []
    for row in rows_named(comparison.rows, names):
        missing = [name for name in row.needs if name not in networks]
        if missing:
            dist.print0(f"{row.name} is skipped: it needs --network {missing[0]}=PATH")
        else:
            kept.append(row)
    if not kept:
        raise ValueError("no row is left. Name its networks with --network NAME=PATH")
    return comparison, kept, networks


def _images(of_file: ImageSet, num: int | None, seeds: tuple[int, ...] | None) -> ImageSet:
    return ImageSet(num or of_file.images, seeds or of_file.seeds)


def _scoring(device: torch.device, metric: str, num: int, ref: str, real: str, batch: int) -> Scoring:
    scorer, source = make_scorer(fetch(ref), device, [metric]), open_images(real)
    if len(source) < num:
        raise ValueError(f"--real {real} has {len(source)} images, fewer than --num {num}")
    picked = torch.linspace(0, len(source) - 1, num).long().tolist()
    scorer = replace(scorer, real=image_features(image_batches(source, picked, batch, 1), scorer.detectors, device))
    identity = {"metric": metric, "reference_sha256": sha256_of(fetch(ref)), "real": f"{num} of {len(source)}"}
    identity["real_content"] = pixels_sha256(source)
    return Scoring(scorer, identity, num, batch)


def _best_weight(row: ComparisonRow, outdir: Path, seeds: Sequence[int], metric: str) -> float | None:
    if not row.weights:
        return None
    return best_weight(row.name, read_record(outdir / "tune" / f"{row.name}.json"), row.weights, seeds, metric)


if __name__ == "__main__":
    main()
