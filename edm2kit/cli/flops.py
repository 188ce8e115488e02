"""Count the parameters and multiply-adds of a network, per layer and in all, without allocating its weights."""

from collections.abc import Mapping
from typing import Any

import click

from edm2kit.cli.click_types import Command
from edm2kit.models import full_architecture
from edm2kit.models.cost import Cost, evaluation_cost
from edm2kit.snapshots.loading import open_weights
from edm2kit.training.config import config_from_dict, preset_path, read_yaml


@click.command(cls=Command)
@click.argument("networks", metavar="PRESET|YAML|SNAPSHOT...", nargs=-1, required=True)
@click.option("--resolution", type=click.IntRange(1), default=64, show_default=True, help="Side of the latents.")
@click.option(
    "--image-channels", type=click.IntRange(1), default=4, show_default=True, help="4 for the VAE, 3 for RGB."
)
@click.option("--classes", type=click.IntRange(0), default=1000, show_default=True, help="0 for an unconditional one.")
def main(networks: tuple[str, ...], resolution: int, image_channels: int, classes: int) -> None:
    """Print what one evaluation of each network costs; with one network, layer by layer.

    A preset of configs/train, a YAML file, or a snapshot (path or URL). Configurations leave the shape of the data
    open: --resolution, --image-channels and --classes are for them, while a snapshot knows its own.

    \b
    python scripts/count_flops.py edm2-img512-xs edm2-img512-s
    python scripts/count_flops.py network-snapshot-0134217-0.100.safetensors
    """
    data = {"img_resolution": resolution, "img_channels": image_channels, "label_dim": classes}
    costs = {}
    for network in networks:
        arguments = find_architecture(network, data)
        costs[network] = evaluation_cost(arguments)
        size, labels = arguments["img_resolution"], arguments["label_dim"]
        click.echo(f"{network}: {arguments['img_channels']}x{size}x{size}, {labels} classes")
    click.echo()
    if len(networks) == 1:
        print_layers(costs[networks[0]])
    else:
        rows = [(name, f"{c.parameters / 1e6:.1f}", f"{c.multiply_adds / 1e9:.1f}") for name, c in costs.items()]
        print_table(("network", "parameters (M)", "multiply-adds (G)"), rows)


def find_architecture(network: str, data: Mapping[str, int]) -> Mapping[str, Any]:
    """Precond's arguments for a preset or YAML file on data of shape `data`, or those of a snapshot."""
    if network.endswith((".safetensors", ".pkl")) or "://" in network:
        return open_weights(network).header.architecture
    path = network if network.endswith((".yaml", ".yml")) else preset_path(network)
    config = config_from_dict(read_yaml(path), str(path))
    return full_architecture(**data, sigma_data=config.sigma_data, network=config.network)


def print_layers(cost: Cost) -> None:
    """Every layer of one network, then its sums."""
    rows = [
        (
            layer.name,
            "" if layer.shape is None else "x".join(map(str, layer.shape)),
            f"{layer.parameters}",
            f"{layer.multiply_adds / 1e6:.3f}",
        )
        for layer in cost.layers
    ]
    rows.append(("in all, with gains", "", f"{cost.parameters}", f"{cost.multiply_adds / 1e6:.3f}"))
    print_table(("layer", "weight", "parameters", "multiply-adds (M)"), rows)


def print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Columns as wide as they need be, numbers to the right."""
    widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        click.echo("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
