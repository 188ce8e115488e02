"""Reproduce published tables: what there is, what it will need, the measurement, the report."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from edm2kit.cli import click_types as cli
from edm2kit.experiments.paper_tables import report as reporting
from edm2kit.experiments.paper_tables.networks import obtain
from edm2kit.experiments.paper_tables.plan import Download, Need, files_beside, measure_flops, need_of
from edm2kit.experiments.paper_tables.run import How, run_cell
from edm2kit.experiments.paper_tables.tables import load_table, table_names
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import atomic_write, cache_folder, fetch, free_bytes
from edm2kit.torch_utils.precision import PRECISIONS, resolve_precision

_DEFAULT_OUTDIR = "runs/reproduce"
_WAIT_MINUTES = 24 * 60  # one rank downloads while the others wait


def _split(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [part.strip() for part in value.split(",")]


def _table_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--metrics", metavar="LIST", callback=_split, help="fid, fd_dinov2.  [default: all]"),
        click.option("--rows", metavar="LIST", callback=_split, help="Rows by name; see `list`.  [default: all]"),
        click.option("--table", metavar="NAME|YAML", required=True, help=f"{', '.join(table_names())}, or a file."),
    ):
        command = option(command)
    return command


# torchrun of torch 2.13 takes --num for its own --numa-binding, unless a lone -- stands before the script
_num = click.option(
    "--num", "--num-images", type=click.IntRange(2), default=50_000, show_default=True, help="Images for each value."
)
_seeds = click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Values for each cell.")
_device = click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
_precision = click.option("--precision", type=click.Choice(["auto", *PRECISIONS]), default="auto", show_default=True)
_outdir = click.option(
    "--outdir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Folder of records.  [default: {_DEFAULT_OUTDIR}/TABLE]",
)


@click.group(cls=cli.Group)
def main() -> None:
    """Reproduce published tables from the published networks.

    \b
    python scripts/reproduce.py list
    python scripts/reproduce.py plan --table autoguidance-1 --tflops 200
    python scripts/reproduce.py download --table autoguidance-1 --rows img512-s-autog
    torchrun --standalone --nproc-per-node 8 scripts/reproduce.py run --table autoguidance-1 --rows img512-s-autog
    python scripts/reproduce.py report --table autoguidance-1
    """


@main.command(name="list")
def list_tables() -> None:
    """Name every table and row, with the published values."""
    for name in table_names():
        table = load_table(name)
        click.echo(f"{name}: {table.title}. {table.source}")
        for row in table.rows:
            values = ", ".join(f"{cell.metric} {cell.value:g}" for cell in row.cells)
            click.echo(f"  {row.name:28s}{row.group}, {row.setting}: {values}")


@main.command()
@_table_options
@_num
@_seeds
@click.option("--tflops", type=click.FloatRange(0, min_open=True), help="Operations a GPU does, 10^12 a second.")
@click.option("--measure", is_flag=True, help="Measure --tflops here, on the first network, with random weights.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Images at once for --measure.")
@_precision
@_device
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
    """Tell what a run will need: downloads, network evaluations, multiply-adds and, with --tflops, GPU-hours."""
    loaded = load_table(table)
    cells = loaded.cells(rows, metrics)
    with dist.session(device) as picked:
        if measure:
            kind = resolve_precision(precision, picked)
            tflops = measure_flops(cells[0], picked, kind, batch) / 1e12
            dist.print0(f"measured on {cells[0].net.run}: {tflops:.3g} Tflop/s, {kind}, batch {batch}\n")
        needs = [need_of(cell, loaded.sampler) for cell in cells]
        for line in _plan_lines(needs, num * seeds, tflops):
            dist.print0(line)


def _plan_lines(needs: Sequence[Need], images: int, tflops: float | None) -> list[str]:
    """The plan for people: cells, sums, downloads."""
    lines = [f"{'cell':36s}{'evaluations an image':>22s}{'multiply-adds':>16s}{'GPU-hours':>12s}"]
    for need in needs:
        evaluations = f"{need.net_evaluations:g} + {need.gnet_evaluations:g}"
        lines.append(
            f"{need.cell.name:36s}{evaluations:>22s}{need.multiply_adds * images:>16.3g}"
            f"{_hours(need.multiply_adds * images, tflops):>12s}"
        )
    total = sum(need.multiply_adds for need in needs) * images
    lines.append(f"{f'in all, {images} images each':36s}{'':22s}{total:>16.3g}{_hours(total, tflops):>12s}")
    lines.append("Decoding and scoring come on top." + ("" if tflops else " --tflops or --measure tells hours."))
    files = {download.url: download for need in needs for download in need.downloads}
    missing = [download for download in files.values() if not download.is_here]
    size = sum(download.num_bytes or 0 for download in missing)
    free = free_bytes(cache_folder())
    lines.append(
        f"\n{len(files)} files, {len(missing)} of them to download, about {size / 1e9:.2f} GB, to {cache_folder()} "
        f"({free / 1e9:.2f} GB free{': not enough' if size > free else ''}):"
    )
    folders: dict[str, list[Download]] = {}
    for download in files.values():
        folder = download.url.rsplit("/", 1)[0] + "/" if "/raw-snapshots/" in download.url else download.url
        folders.setdefault(folder, []).append(download)
    lines.extend(_download_line(name, downloads) for name, downloads in folders.items())
    networks = {network.name: network for need in needs for network in need.cell.networks}
    for network in networks.values():
        if network.fit_error is not None:
            count = len(network.urls)
            lines.append(
                f"{network.name} will be rebuilt from {count} raw snapshots, fit error {network.fit_error:.2g}"
            )
    return lines


def _download_line(name: str, downloads: Sequence[Download]) -> str:
    here, size = sum(download.is_here for download in downloads), sum(d.num_bytes or 0 for d in downloads)
    text = f"{size / 1e9:.3f} GB" if all(d.num_bytes for d in downloads) else "size unknown"
    return f"  {here} of {len(downloads)} here{text:>15s}  {name}"


def _hours(multiply_adds: float, tflops: float | None) -> str:
    return "" if tflops is None else f"{2 * multiply_adds / (tflops * 1e12) / 3600:.3g}"


@main.command()
@_table_options
@_outdir
def download(table: str, rows: Sequence[str] | None, metrics: Sequence[str] | None, outdir: Path | None) -> None:
    """Get every file that a run will need, and rebuild the networks that are not published.

    For a machine with a connection, before `run` on one without: set EDM2_OFFLINE=1 there. Needs no GPU. What is
    there already is only checked; a file that cannot be had does not stop the others.
    """
    loaded = load_table(table)
    cells = loaded.cells(rows, metrics)
    networks = {network.name: network for cell in cells for network in cell.networks}
    folder = _folder(outdir, loaded.name) / "networks"
    jobs = [(fetch, (url,)) for url in dict.fromkeys(url for cell in cells for url in files_beside(cell))]
    jobs += [(obtain, (network, folder)) for network in networks.values()]
    failures = 0
    for job, arguments in jobs:
        try:
            click.echo(job(*arguments))
        except (ValueError, OSError) as error:
            failures += 1
            click.echo(f"Error: {error}", err=True)
    if failures:
        raise ValueError(f"{failures} of {len(jobs)} could not be had, for the reasons above; run this again for them")


@main.command()
@_table_options
@_num
@_seeds
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Images at once, per process.")
@click.option("--save-every", type=click.IntRange(2), default=2000, show_default=True, help="Images between saves.")
@click.option("--vae", metavar="NAME|DIR", help="VAE that decodes latents.  [default: the one the networks name]")
@click.option("--weights-dir", metavar="DIR", help="Where detector weights lie.  [default: the cache, or a download]")
@_precision
@_device
@_outdir
def run(
    table: str,
    rows: Sequence[str] | None,
    metrics: Sequence[str] | None,
    device: str,
    outdir: Path | None,
    **how: Any,
) -> None:
    """Measure the cells of a table, on all GPUs under torchrun.

    Finished cells are passed over, and a command that was killed goes on within a cell when it is run again, also
    on another number of GPUs. A network that cannot be had does not stop the cells that do without it.
    """
    loaded = load_table(table)
    cells = loaded.cells(rows, metrics)
    left_out = 0
    with dist.session(device, timeout_minutes=_WAIT_MINUTES) as picked:
        for cell in cells:
            missing = run_cell(loaded, cell, How(**how), _folder(outdir, loaded.name), picked)
            if missing is not None:
                left_out += 1
                dist.warn0(f"{cell.name} is left out: {missing}")
    if left_out:
        raise ValueError(
            f"{left_out} of {len(cells)} cells were left out, for the reasons above; run this again for them"
        )


@main.command()
@click.option("--table", metavar="NAME|YAML", required=True, help=f"{', '.join(table_names())}, or a file.")
@_outdir
def report(table: str, outdir: Path | None) -> None:
    """Write published and measured values side by side, as report.md and report.html in the run's folder."""
    loaded = load_table(table)
    folder = _folder(outdir, loaded.name)
    lines, notes = reporting.lines_of(loaded, folder), reporting.notes_of(loaded, folder)
    for name, text in (
        ("report.md", reporting.markdown(loaded, lines, notes)),
        ("report.html", reporting.html_page(loaded, lines, notes)),
    ):
        with atomic_write(folder / name, "w") as file:
            file.write(text)
        click.echo(f"Wrote {folder / name}")


def _folder(outdir: Path | None, table: str) -> Path:
    return outdir if outdir is not None else Path(_DEFAULT_OUTDIR) / table


if __name__ == "__main__":
    main()
