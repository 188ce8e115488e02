"""The networks of a table on this machine: downloaded, or rebuilt from the raw snapshots of their run."""

from pathlib import Path

from edm2kit.ema.rebuild import plan_outputs, write_outputs
from edm2kit.experiments.paper_tables.tables import Network
from edm2kit.snapshots.file_format import read_header
from edm2kit.snapshots.weights import open_weights
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import fetch


def obtain(network: Network, folder: Path) -> Path:
    """A snapshot file of `network`; one that has to be rebuilt goes to `folder`, and stays there for other cells.

    Call on one rank. Raises ValueError where a file cannot be had, or the raw snapshots do not fit each other.
    """
    if len(network.urls) == 1:
        return fetch(network.urls[0])
    path = folder / f"{network.name}.safetensors"
    if not path.exists():
        dist.print0(f"{network.name} is not published; rebuilding it from {len(network.urls)} raw snapshots")
        inputs = [open_weights(url) for url in network.urls]
        outputs = plan_outputs(inputs, [network.ema_std], [network.nimg])
        dist.print0(f"fit error {outputs[0].fit.error:.2g}, rounding {outputs[0].fit.rounding:.2g}")
        write_outputs(inputs, outputs, [path])
    header = read_header(path)
    if (header.nimg, header.ema_std) != (network.nimg, network.ema_std) or header.recipe is None:
        raise ValueError(f"{path} is not {network.name} (it has {header.nimg} images, EMA length {header.ema_std})")
    return path
