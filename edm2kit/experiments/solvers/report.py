"""Measuring the solvers: the record, the picture and the tables of docs/solvers.md."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from edm2kit.cli import click_types as cli
from edm2kit.experiments.documents import checkout, markdown_table
from edm2kit.experiments.solvers import image_networks, toy_networks
from edm2kit.experiments.solvers.convergence import DENOISERS, HEUN_STEPS, MEASURED, measure
from edm2kit.torch_utils.files import atomic_write, provenance

FOLDER = Path("experiments", "solvers")
RECORD_NAME, PICTURE_NAME = "orders.json", "orders.png"
TOY_RECORD_NAME, IMAGES_RECORD_NAME = "toy.json", "images.json"
STEPS = (5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193)
COMMAND = "python scripts/measure_solvers.py"


def document_parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of docs/solvers.md by name."""
    results = record["results"]
    head = ["solver", "order by formula", *(f"measured, {name}" for name in results)]
    head += [f"evaluations, {name}" for name in results]
    lines = []
    for solver in next(iter(results.values())):
        rows = [rows[solver] for rows in results.values()]
        orders = [f"{row['order']:.2f}" for row in rows]
        needed = [str(row["evaluations_like_32_heun_steps"] or "more than 400 steps") for row in rows]
        lines.append([f"`{solver}`", str(rows[0]["expected_order"]), *orders, *needed])
    origin = f"Recorded by `{record['command']}` at commit {record['provenance']['commit'][:10]}."
    return {"solvers": f"{markdown_table(head, lines, 'l' + 'r' * (len(head) - 1))}\n\n{origin}"}


def toy_parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated part of docs/solvers.md on the toy's networks."""
    origin = (
        f"{record['num_samples']:,} samples, training seed {record['training_seed']}, autoguidance with weight "
        f"{record['weight']:g}. Recorded by `{record['command']}` at commit {record['provenance']['commit'][:10]}."
    )
    return {"toy": f"{toy_networks.table(record)}\n\n{origin}"}


def image_parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated part of docs/solvers.md on networks of images."""
    networks = " led away from ".join(f"`{name}`" for name in record["files"])
    origin = (
        f"{record['num_images']} images of {networks} with weight {record['weight']:g}. "
        f"Recorded by `{record['command']}` at commit {record['provenance']['commit'][:10]}."
    )
    return {"images": f"{image_networks.table(record)}\n\n{origin}"}


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draw error against evaluations for every solver, one panel for each denoiser."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    panels = figure.subplots(1, len(record["results"]), sharey=True)
    for panel, (name, rows) in zip(panels, record["results"].items(), strict=True):
        for k, (solver, row) in enumerate(rows.items()):
            label = f"{solver} ({row['order']:.2f})"
            panel.loglog(row["evaluations"], row["errors"], "os^v"[k % 4] + "-", color=f"C{k}", label=label, ms=4)
        heun = rows["heun"]
        goal = heun["errors"][heun["evaluations"].index(2 * 33 - 1)]
        panel.axhline(goal, color="k", linestyle=":", linewidth=1)
        panel.set_title(f"mixture of Gaussians, {name}")
        panel.set_xlabel("evaluations of the main network")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, title="solver (measured order)", title_fontsize=8)
    panels[0].set_ylabel("root mean square error")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)


def _write(path: Path, record: Mapping[str, Any]) -> None:
    with atomic_write(path, "w") as file:
        file.write(json.dumps(record, indent=1) + "\n")


@click.command(cls=cli.Command)
@click.option(
    "--outdir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the record and the picture  [default: experiments/solvers]",
)
@click.option(
    "--toy",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Measure on the networks that toy_example.py trained in this folder (seed 0) instead",
)
@click.option(
    "--net",
    metavar="SNAPSHOT",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Measure on this network of images instead; also needs --gnet",
)
@click.option(
    "--gnet",
    metavar="SNAPSHOT",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Its guide network, with --net",
)
@click.option("--guidance", metavar="W", type=float, default=2.0, help="Weight of autoguidance, with --net")
@click.option(
    "--samples",
    metavar="N",
    type=click.IntRange(min=2),
    help="Samples per solver and number of steps  [default: 256 with --toy, 4 with --net]",
)
def main(
    outdir: Path | None, toy: Path | None, net: Path | None, gnet: Path | None, guidance: float, samples: int | None
) -> None:
    """Measure the order of convergence of every solver on an exact mixture of Gaussians; a minute on a CPU.

    Writes a record and a picture. Then run: python scripts/write_documents.py
    """
    folder = checkout() / FOLDER if outdir is None else outdir
    folder.mkdir(parents=True, exist_ok=True)
    if (net is None) != (gnet is None):
        raise click.UsageError("--net and --gnet belong together; give both")
    if toy is not None:
        found = {"command": f"{COMMAND} --toy DIR", **toy_networks.measure_toy(toy, 0, samples or 256)}
        _write(folder / TOY_RECORD_NAME, found)
        click.echo(toy_parts(found)["toy"])
        return
    if net is not None and gnet is not None:
        images = image_networks.measure_images(net, gnet, guidance, samples or 4)
        command = f"{COMMAND} --net {net.name} --gnet {gnet.name} --guidance {guidance:g}"
        found = {"command": command, **images}
        _write(folder / IMAGES_RECORD_NAME, found)
        click.echo(image_parts(found)["images"])
        return
    record = {
        "command": COMMAND,
        "provenance": provenance(),
        "denoisers": list(DENOISERS),
        "solvers": list(MEASURED),
        "heun_steps": HEUN_STEPS,
        "results": measure(STEPS),
    }
    _write(folder / RECORD_NAME, record)
    plot(record, folder / PICTURE_NAME)
    click.echo(document_parts(record)["solvers"])
