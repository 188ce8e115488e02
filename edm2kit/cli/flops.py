"""Count the parameters and multiply-adds of a network, per layer and in total, without allocating its weights."""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("flops")  # before torch is imported

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from edm2kit.cli.click_types import AtLeast, Command
from edm2kit.cli.presets import summary
from edm2kit.models import full_architecture
from edm2kit.models.cost import Cost, evaluation_cost
from edm2kit.snapshots.loading import open_weights
from edm2kit.training.config import config_from_dict, preset_names, preset_path, read_yaml


@click.command(cls=Command, epilog=f"Presets, smallest first: {summary(preset_names())}")
@click.argument("networks", metavar="PRESET|YAML|SNAPSHOT...", nargs=-1, required=True)
@click.option("--resolution", metavar="N", type=AtLeast(int, 1), default=64, help="Width and height of the latents")
@click.option("--image-channels", metavar="N", type=AtLeast(int, 1), default=4, help="4 for VAE latents, 3 for RGB")
@click.option("--classes", metavar="N", type=AtLeast(int, 0), default=1000, help="0 for an unconditional network")
def main(networks: tuple[str, ...], resolution: int, image_channels: int, classes: int) -> None:
    """Print the cost of one evaluation of each network; of a single network, layer by layer.

    A network is a training preset, a YAML file, or a snapshot (path or URL, or a run folder for its newest one).
    Presets and YAML files leave the shape of the data open, so --resolution, --image-channels and --classes set it; a
    snapshot knows its own.

    \b
    python scripts/count_flops.py edm2-img512-xs edm2-img512-s
    python scripts/count_flops.py network-snapshot-0134217-0.100.safetensors
    """
    data = {"img_resolution": resolution, "img_channels": image_channels, "label_dim": classes}
    costs = {}
    for network in networks:
        arguments, kind = find_architecture(network, data)
        costs[network] = evaluation_cost(arguments, kind)
        size, labels = arguments["img_resolution"], arguments["label_dim"]
        click.echo(f"{network}: {arguments['img_channels']}x{size}x{size}, {labels} classes")
    click.echo()
    if len(networks) == 1:
        print_layers(costs[networks[0]])
    else:
        rows = [(name, f"{c.parameters / 1e6:.1f}", f"{c.multiply_adds / 1e9:.1f}") for name, c in costs.items()]
        print_table(("network", "parameters (M)", "multiply-adds (G)"), rows)


def find_architecture(network: str, data: Mapping[str, int]) -> tuple[Mapping[str, Any], str]:
    """Architecture and kind of the network of a preset or YAML file with data of shape `data`, or of a snapshot."""
    suffix = Path(network).suffix.lower()
    if suffix in (".safetensors", ".pkl") or "://" in network or Path(network).is_dir():
        header = open_weights(network).header
        return header.architecture, header.network
    path = network if suffix in (".yaml", ".yml") else preset_path(network)
    config = config_from_dict(read_yaml(path), str(path))
    architecture = full_architecture(**data, sigma_data=config.sigma_data, network=config.network)
    return architecture, config.network_kind


def print_layers(cost: Cost) -> None:
    """Print every layer of one network, then the totals."""
    rows = [
        (
            layer.name,
            "" if layer.shape is None else "x".join(map(str, layer.shape)),
            f"{layer.parameters}",
            f"{layer.multiply_adds / 1e6:.3f}",
        )
        for layer in cost.layers
    ]
    rows.append(("total, with gains", "", f"{cost.parameters}", f"{cost.multiply_adds / 1e6:.3f}"))
    print_table(("layer", "weight", "parameters", "multiply-adds (M)"), rows)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with the first column left-aligned and the numbers right-aligned."""
    widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        click.echo("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
