"""Reproduce published tables: list them, plan, download, measure, report."""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("reproduce")  # before torch is imported

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edm2kit.cli import click_types as cli
from edm2kit.experiments.paper_tables import report as reports
from edm2kit.experiments.paper_tables.networks import PublishedNetwork, snapshot_of
from edm2kit.experiments.paper_tables.plan import CellCost, NeededFile, cell_cost, measure_flops, other_files
from edm2kit.experiments.paper_tables.run import MeasureOptions, measure_cell
from edm2kit.experiments.paper_tables.tables import load_table, table_names
from edm2kit.experiments.prompt_figures.figures import FIGURES, figure_with, make_figure, plan_lines
from edm2kit.models.diffusers_loading import OFFLOADS
from edm2kit.models.preconditioning import PRECISIONS, resolve_precision
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.cache import cache_folder, fetch
from edm2kit.torch_utils.files import atomic_write, free_bytes

_DEFAULT_OUTDIR = "runs/reproduce"
_WAIT_MINUTES = 24 * 60  # one rank downloads while the others wait


_table = click.option(
    "--table", metavar="NAME|YAML", required=True, help=f"Table: {', '.join(table_names())}, or your own file"
)
_rows = click.option(
    "--rows", metavar="LIST", type=cli.Parsed(cli.split_names), help="Rows by name, see `list`  [default: all]"
)
_metrics = click.option(
    "--metrics", metavar="LIST", type=cli.Parsed(cli.split_names), help="Metrics, fid and/or fd_dinov2  [default: all]"
)
# torchrun of torch 2.13 reads --num as its own --numa-binding, unless a lone -- precedes the script
_num = click.option(
    "--num", "--num-images", metavar="N", type=click.IntRange(2), default=50_000, help="Images per value"
)
_seeds = click.option("--seeds", metavar="N", type=click.IntRange(1), default=3, help="Values per cell")
_device = cli.device_option()
_precision = click.option(
    "--precision", type=click.Choice(["auto", *PRECISIONS]), default="auto", help="auto: fp16 on CUDA, else fp32"
)
_outdir = click.option(
    "--outdir",
    metavar="DIR",
    type=cli.OutputFolder(),
    help=f"Folder of the records  [default: {_DEFAULT_OUTDIR}/TABLE]",
)


_prompts_file = click.Path(path_type=Path, dir_okay=False, exists=True)
_numbers = cli.Parsed(lambda text: tuple(float(part) for part in text.split(",")))


@click.group(cls=cli.Group)
def main() -> None:
    """Reproduce published tables with the published networks.

    \b
    python scripts/reproduce.py list
    python scripts/reproduce.py plan --table autoguidance-1 --tflops 200
    python scripts/reproduce.py download --table autoguidance-1 --rows img512-s-autog
    torchrun --standalone --nproc-per-node 8 scripts/reproduce.py run --table autoguidance-1 --rows img512-s-autog
    python scripts/reproduce.py report --table autoguidance-1
    python scripts/reproduce.py figure --name if-mix --plan
    """


@main.command(name="list")
def list_tables() -> None:
    """List all tables and rows with the published values."""
    for name in table_names():
        table = load_table(name)
        click.echo(f"{name}: {table.title}. {table.source}")
        for row in table.rows:
            values = ", ".join(f"{cell.metric} {cell.value:g}" for cell in row.cells)
            click.echo(f"  {row.name:28s}{row.group}, {row.setting}: {values}")


@main.command()
@cli.section("Cells", _table, _rows, _metrics, _num, _seeds)
@cli.section(
    "Speed",
    click.option("--tflops", metavar="T", type=cli.AtLeast(float, 1e-6), help="Assumed Tflop/s of a GPU"),
    click.option("--measure", is_flag=True, help="Measure the Tflop/s here, on the first network with random weights"),
    click.option("--batch", metavar="N", type=click.IntRange(1), default=32, help="Images per batch for --measure"),
    _precision,
    _device,
    cli.timeout_option(),
)
def plan(
    table: str,
    rows: Sequence[str] | None,
    metrics: Sequence[str] | None,
    num: int,
    seeds: int,
    tflops: float | None,
    measure: bool,
    batch: int,
    precision: str,
    device: str,
) -> None:
    """Print what a run takes: downloads, network evaluations, multiply-adds and GPU-hours.

    Downloads nothing. GPU-hours need --tflops or --measure.
    """
    loaded = load_table(table)
    cells = loaded.cells(rows, metrics)
    with dist.session(device) as picked:
        if measure:
            resolved = resolve_precision(precision, picked)
            tflops = measure_flops(cells[0], picked, resolved, batch) / 1e12
            dist.print0(f"measured on {cells[0].net.run}: {tflops:.3g} Tflop/s, {resolved}, batch {batch}\n")
        costs = [cell_cost(cell, loaded.sampler) for cell in cells]
        for line in [*_cost_lines(costs, num * seeds, tflops), "", *_file_lines(costs)]:
            dist.print0(line)
        for network in {network.name: network for cell in cells for network in cell.networks}.values():
            if network.fit is not None:
                dist.print0(
                    f"{network.name} will be rebuilt from {len(network.urls)} raw snapshots, "
                    f"fit error {network.fit.error:.2g}"
                )


def _cost_lines(costs: Sequence[CellCost], images: int, tflops: float | None) -> list[str]:
    lines = [f"{'cell':36s}{'evaluations per image':>22s}{'multiply-adds':>16s}{'GPU-hours':>12s}"]
    for cost in costs:
        evaluations = f"{cost.net_evaluations:g} + {cost.gnet_evaluations:g}"
        lines.append(f"{cost.cell.name:36s}{evaluations:>22s}{_work(cost.multiply_adds * images, tflops)}")
    total = sum(cost.multiply_adds for cost in costs) * images
    lines.append(f"{f'total, {images} images per cell':36s}{'':22s}{_work(total, tflops)}")
    lines.append("Decoding and scoring come on top.")
    if tflops is None:
        lines.append("Use --tflops or --measure to see GPU-hours.")
    return lines


def _work(multiply_adds: float, tflops: float | None) -> str:
    """The last two columns of a line; a multiply-add is two operations."""
    hours = "" if tflops is None else f"{2 * multiply_adds / (tflops * 1e12) / 3600:.3g}"
    return f"{multiply_adds:>16.3g}{hours:>12s}"


def _file_lines(costs: Sequence[CellCost]) -> list[str]:
    files = {file.url: file for cost in costs for file in cost.files}
    missing = [file for file in files.values() if not file.is_here]
    size = sum(file.num_bytes or 0 for file in missing)
    free = free_bytes(cache_folder())
    verdict = f"{free / 1e9:.2f} GB free"
    if size > free:
        verdict += ": not enough"
    lines = [
        f"{len(files)} files, {len(missing)} of them to download, about {size / 1e9:.2f} GB, to {cache_folder()} "
        f"({verdict}):"
    ]
    by_place: dict[str, list[NeededFile]] = {}
    for file in files.values():
        place = file.url
        if "/raw-snapshots/" in place:  # these are many: a line for their folder
            place = place.rsplit("/", 1)[0] + "/"
        by_place.setdefault(place, []).append(file)
    for place, group in by_place.items():
        sizes = [file.num_bytes for file in group if file.num_bytes is not None]
        shown = f"{sum(sizes) / 1e9:.3f} GB"
        if len(sizes) < len(group):
            shown = "size unknown"
        here = sum(file.is_here for file in group)
        lines.append(f"  {here} of {len(group)} here{shown:>15s}  {place}")
    return lines


@main.command()
@cli.section("Cells", _table, _rows, _metrics)
@cli.section("Output", _outdir)
def download(table: str, rows: Sequence[str] | None, metrics: Sequence[str] | None, outdir: Path | None) -> None:
    """Download every file that a run needs, and rebuild the networks that are not published.

    Use this on a machine with a connection, then `run` with EDM2_OFFLINE=1 on one without. No GPU is needed. Files
    that are here already are only checked. If a download fails, the others still happen.
    """
    loaded = load_table(table)
    cells = loaded.cells(rows, metrics)
    networks = {network.name: network for cell in cells for network in cell.networks}
    folder = _folder(outdir, loaded.name) / "networks"
    urls = list(dict.fromkeys(url for cell in cells for url in other_files(cell)))
    sources: list[str | PublishedNetwork] = [*urls, *networks.values()]
    failures = 0
    for source in sources:
        try:
            click.echo(fetch(source) if isinstance(source, str) else snapshot_of(source, folder))
        except (ValueError, OSError) as error:
            failures += 1
            click.echo(dist.one_line(f"Error: {error}"), err=True)
    if failures:
        raise ValueError(
            f"{failures} of {len(sources)} downloads failed, see above. Run the same command to try them again"
        )


@main.command()
@cli.section("Cells", _table, _rows, _metrics, _num, _seeds)
@cli.section(
    "Output",
    _outdir,
    click.option("--save-every", metavar="N", type=click.IntRange(2), default=2000, help="Images between saves"),
)
@cli.section(
    "Networks and speed",
    click.option("--vae", metavar="NAME|DIR", help="VAE that decodes latents  [default: the one the networks name]"),
    click.option("--weights-dir", metavar="DIR", help="Folder of detector weights  [default: cache or download]"),
    click.option("--batch", metavar="N", type=click.IntRange(1), default=32, help="Images per batch and process"),
    _precision,
    _device,
    cli.timeout_option(),
)
def run(
    table: str,
    rows: Sequence[str] | None,
    metrics: Sequence[str] | None,
    device: str,
    outdir: Path | None,
    **options: Any,
) -> None:
    """Measure the cells of a table, with torchrun on all GPUs.

    Complete cells are skipped. After an interruption, run the same command to resume within a cell, even with another
    number of GPUs. If a network cannot be downloaded, its cells are skipped and reported.
    """
    loaded = load_table(table)
    cells = loaded.cells(rows, metrics)
    skipped = 0
    with dist.session(device, timeout_minutes=_WAIT_MINUTES) as picked:
        for cell in cells:
            reason = measure_cell(loaded, cell, MeasureOptions(**options), _folder(outdir, loaded.name), picked)
            if reason is not None:
                skipped += 1
                dist.warn0(f"{cell.name} is skipped: {reason}")
    if skipped:
        raise ValueError(f"{skipped} of {len(cells)} cells were skipped, see above. Run the same command to try again")


@main.command()
@cli.section("Input and output", _table, _outdir)
def report(table: str, outdir: Path | None) -> None:
    """Write published and measured values side by side, as report.md and report.html in the folder of the records."""
    loaded = load_table(table)
    folder = _folder(outdir, loaded.name)
    lines, notes = reports.lines_of(loaded, folder), reports.notes_of(loaded, folder)
    texts = {
        "report.md": reports.markdown(loaded, lines, notes),
        "report.html": reports.html_page(loaded, lines, notes),
    }
    for name, text in texts.items():
        with atomic_write(folder / name, "w") as file:
            file.write(text)
        click.echo(f"Wrote {folder / name}")


@main.command()
@cli.section(
    "Figure",
    click.option("--name", required=True, metavar="NAME", help=f"Figure: {', '.join(FIGURES)}"),
    click.option("--plan", "only_plan", is_flag=True, help="Print downloads, memory and evaluations, then stop"),
    click.option("--prompts", metavar="FILE", type=_prompts_file, help="Other prompts, one per line"),
    click.option("--weights", metavar="LIST", type=_numbers, help="Rows: guidance weights  [default: published]"),
    click.option("--shares", metavar="LIST", type=_numbers, help="Columns: shares of autoguidance  [default: 0 to 1]"),
    click.option("--seeds", type=cli.IntRanges(), default="0", help="One image per seed in each cell"),
    click.option("--steps", metavar="N", type=click.IntRange(2), default=50, help="Euler steps of the first stage"),
)
@cli.section(
    "Networks and output",
    click.option("--net", metavar="diffusers:...", help="Another main network"),
    click.option("--gnet", metavar="diffusers:...", help="Another guide network"),
    click.option("--super-resolution", metavar="NAME", help="Pipeline that enlarges, e.g. DeepFloyd/IF-II-L-v1.0"),
    click.option("--offload", type=click.Choice(OFFLOADS), help="Move parts to the GPU when needed"),
    click.option(
        "--outdir",
        metavar="DIR",
        type=cli.OutputFolder(),
        help=f"Folder for images and sheet.png  [default: {_DEFAULT_OUTDIR}/NAME]",
    ),
    _precision,
    _device,
    cli.timeout_option(),
)
def figure(
    name: str,
    only_plan: bool,
    seeds: tuple[int, ...],
    steps: int,
    super_resolution: str | None,
    offload: str | None,
    outdir: Path | None,
    precision: str,
    device: str,
    **changes: Any,
) -> None:
    """Make a published figure of text-to-image networks. Images that exist are kept."""
    wanted = figure_with(name, **changes)
    if only_plan:
        for line in plan_lines(wanted, len(wanted.prompts), len(seeds), steps):
            click.echo(line)
        return
    with dist.session(device) as picked:
        sheet = make_figure(
            wanted,
            _folder(outdir, name),
            picked,
            seeds,
            steps,
            precision,
            offload,
            super_resolution,
            say=dist.print0,
        )
    click.echo(f"Wrote {sheet}")


def _folder(outdir: Path | None, table: str) -> Path:
    return Path(_DEFAULT_OUTDIR) / table if outdir is None else outdir


if __name__ == "__main__":
    main()
