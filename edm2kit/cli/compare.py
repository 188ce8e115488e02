"""Compare ways to guide on networks of your own: tune weights, report scores on other seeds, draw a sheet."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from edm2kit.cli import click_types as cli
from edm2kit.cli.generation import prepare
from edm2kit.cli.image_source import image_batches, open_images
from edm2kit.data.image_files import to_image
from edm2kit.experiments.compare_guidance.cost import describe_student, measure_costs
from edm2kit.experiments.compare_guidance.measure import (
    Yardstick,
    best_weight,
    measure_real,
    measure_row,
    read_record,
)
from edm2kit.experiments.compare_guidance.page import DOCUMENT, FOLDER, METRIC, RECORD_NAME, document_parts, gather
from edm2kit.experiments.compare_guidance.rows import ROWS_FILE, Row, chosen, load_rows
from edm2kit.experiments.compare_guidance.sheet import Strip, draw_sheet
from edm2kit.experiments.documents import checkout, write_parts
from edm2kit.metrics.scoring import image_features, make_scorer
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import atomic_write, fetch, sha256_of
from edm2kit.torch_utils.records import write_json

_TUNING_SEED = "1000000"  # far from those of any report


class Named(click.ParamType):
    """NAME=PATH of a network, or another file that rows name in braces, as a pair."""

    name = "name=path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, path = value.partition("=")
        if not equals or not Path(path).is_file():
            self.fail(f"{value!r} is not NAME=PATH of a file that is there; write for example main=net.safetensors")
        return name, path


def _split(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [part.strip() for part in value.split(",")]


def _options(*options: Callable) -> Callable[[Callable], Callable]:
    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_rows = _options(
    click.option("--rows", "names", metavar="LIST", callback=_split, help="Rows by name.  [default: all]"),
    click.option(
        "--rows-file", type=click.Path(path_type=Path, dir_okay=False), default=ROWS_FILE, help="YAML of rows."
    ),
    click.option("--network", "networks", type=Named(), multiple=True, help="A file that rows name in braces."),
    click.option("--outdir", type=click.Path(path_type=Path, file_okay=False), default="runs/comparison"),
)
_scores = _options(
    click.option("--ref", metavar="NPZ", required=True, help="Reference statistics; of calculate_metrics.py ref."),
    click.option("--real", metavar="PATH", required=True, help="Real images, for precision, recall and coverage."),
    click.option("--batch", type=click.IntRange(min=1), default=50, show_default=True, help="Images at once."),
    click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu."),
)


def _num(default: int) -> Callable:
    # torchrun takes --num for its own --numa-binding, unless a lone -- stands before the script
    return click.option("--num", "--num-images", type=click.IntRange(min=6), default=default, show_default=True)


@click.group(cls=cli.Group)
def main() -> None:
    """Compare ways to guide. What is measured stays in --outdir, and is not measured again.

    \b
    common="--network main=... --network guide=... --ref reference.npz --real pictures.zip"
    python scripts/compare_guidance.py tune $common
    python scripts/compare_guidance.py report $common --fresh fresh
    python scripts/compare_guidance.py sheet --network main=... --network guide=...
    python scripts/compare_guidance.py table --network main=... --network guide=...
    """


@main.command()
@_rows
@_scores
@_num(200)
@click.option("--seed", "seeds", type=cli.IntRanges(), default=_TUNING_SEED, show_default=True, help="First seeds.")
def tune(outdir: Path, num: int, seeds: tuple[int, ...], device: str, **given: Any) -> None:
    """Score every row at every weight it lists."""
    rows, networks = _take_rows(given)
    with dist.session(device) as where:
        yardstick = _yardstick(where, num, **given)
        for row in rows:
            measure_row(outdir / "tune" / f"{row.name}.json", row, networks, yardstick, row.weights, seeds)


@main.command()
@_rows
@_scores
@_num(400)
@click.option("--seed", "seeds", type=cli.IntRanges(), default="10000,20000", show_default=True, help="First seeds.")
@click.option(
    "--tuned-seed", "tuned", type=cli.IntRanges(), default=_TUNING_SEED, show_default=True, help="Those of `tune`."
)
@click.option("--fresh", metavar="PATH", help="Real images that nothing else saw: how far real is from real.")
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
    weights = {row.name: _best(row, outdir, tuned) for row in rows}
    with dist.session(device) as where:
        yardstick = _yardstick(where, num, **given)
        if fresh is not None:
            measure_real(outdir / "report" / "real.json", open_images(fresh), yardstick, range(len(seeds)))
        for row in rows:
            path = outdir / "report" / f"{row.name}.json"
            measure_row(path, row, networks, yardstick, [weights[row.name]], seeds)


@main.command()
@_rows
@click.option("--batch", type=click.IntRange(min=1), default=50, show_default=True, help="Images at once.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="The least of so many counts.")
@click.option(
    "--tuned-seed", "tuned", type=cli.IntRanges(), default=_TUNING_SEED, show_default=True, help="Those of `tune`."
)
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
def cost(outdir: Path, batch: int, rounds: int, tuned: tuple[int, ...], device: str, **given: Any) -> None:
    """Time the rows at their best weights, and count their multiply-adds; on a machine that does nothing else."""
    rows, networks = _take_rows(given)
    with dist.session(device) as where:
        generations = {row.name: prepare(row.request(_best(row, outdir, tuned), networks), where) for row in rows}
        found = measure_costs(generations, batch, rounds)
    for name, values in found["rows"].items():
        click.echo(f"{name}: {values['seconds']:.4f} s, {values['multiply_adds']:.3g} multiply-adds an image")
    write_json(outdir / "cost.json", found)


@main.command(name="table")
@_rows
@click.option(
    "--publish", is_flag=True, help="Also update experiments/compare_guidance/ and docs/guidance.md in the checkout."
)
def make_table(outdir: Path, publish: bool, **given: Any) -> None:
    """Print the table of what was reported; write it and its record into --outdir."""
    rows, networks = _take_rows(given)
    record = gather(rows, {row.name: row.cost(networks) for row in rows}, outdir)
    if (outdir / "cost.json").exists() and "student" in networks:
        costs = json.loads((outdir / "cost.json").read_text(encoding="utf-8"))
        record |= {"costs": costs, "student": describe_student(Path(networks["student"]))}
    parts = document_parts(record)
    click.echo("\n\n".join(parts.values()))
    write_json(outdir / RECORD_NAME, record)
    if publish:
        write_json(checkout() / FOLDER / RECORD_NAME, record)
        write_parts(checkout() / DOCUMENT, parts)


@main.command()
@_rows
@click.option("--images", type=click.IntRange(min=1), default=4, show_default=True, help="For each weight.")
@click.option("--dest", type=click.Path(path_type=Path, dir_okay=False), help="The PNG.  [default: in --outdir]")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
def sheet(outdir: Path, images: int, dest: Path | None, device: str, **given: Any) -> None:
    """Draw one picture of every row at every weight, seeds 0, 1, ..."""
    rows, networks = _take_rows(given)
    with dist.session(device) as where:
        lines = [(row.title, [_strip(row, w, networks, images, where) for w in row.weights or (None,)]) for row in rows]
        path = dest or outdir / "sheet.png"
        with atomic_write(path) as file:
            draw_sheet(lines).save(file, "PNG", optimize=True)
    click.echo(f"The sheet: {path}")


def _take_rows(given: dict[str, Any]) -> tuple[list[Row], Mapping[str, str]]:
    """The rows asked for whose files were all named, and those files; tells which rows are left out."""
    names, networks = given.pop("names"), dict(given.pop("networks"))
    rows = chosen(load_rows(given.pop("rows_file")), names)
    kept = []
    for row in rows:
        if missing := [name for name in row.needs if name not in networks]:
            dist.print0(f"{row.name} is left out: it needs --network {missing[0]}=PATH")
        else:
            kept.append(row)
    if not kept:
        raise ValueError("no row is left; name networks by --network NAME=PATH")
    return kept, networks


def _yardstick(device: torch.device, num: int, ref: str, real: str, batch: int) -> Yardstick:
    scorer, source = make_scorer(fetch(ref), device, [METRIC]), open_images(real)
    if len(source) < num:
        raise ValueError(f"--real {real} holds {len(source)} images, --num asks for as many as {num}")
    picked = torch.linspace(0, len(source) - 1, num).long().tolist()
    scorer = replace(scorer, real=image_features(image_batches(source, picked, batch, 1), scorer.detectors, device))
    identity = {"metric": METRIC, "reference_sha256": sha256_of(fetch(ref)), "real": f"{num} of {len(source)}"}
    return Yardstick(scorer, identity, num, batch)


def _best(row: Row, outdir: Path, seeds: Sequence[int]) -> float | None:
    if not row.weights:
        return None
    return best_weight(row.name, read_record(outdir / "tune" / f"{row.name}.json"), row.weights, seeds, METRIC)


def _strip(row: Row, weight: float | None, networks: Mapping[str, str], count: int, device: torch.device) -> Strip:
    generation = prepare(row.request(weight, networks, "--balanced"), device)
    images = [to_image(pixels) for batch in generation.batches(range(count), count) for pixels in batch.images.numpy()]
    return Strip("" if weight is None else f"w = {weight:g}", images)


if __name__ == "__main__":
    main()
