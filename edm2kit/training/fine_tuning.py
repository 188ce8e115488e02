"""Fine-tuning: starting from the weights of another run."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from edm2kit.models.edm2 import AUGMENTATION_WEIGHTS
from edm2kit.models.encoders import make_encoder
from edm2kit.models.networks import DEFAULT_NETWORK, NETWORKS
from edm2kit.models.preconditioning import Preconditioner
from edm2kit.snapshots.file_format import Header, network_on_meta
from edm2kit.snapshots.loading import load_snapshot, local_file, open_weights
from edm2kit.torch_utils.files import sha256_of
from edm2kit.training.config import TrainConfig


def adopt_source(config: TrainConfig) -> TrainConfig:
    """`config` with the hash of its `init_from`, and the network arguments of that snapshot where it sets none.

    Unchanged if `init_from` is None; a run folder becomes the name of its newest snapshot. Raises ValueError if that is
    not a snapshot, or not the one of `init_sha256`.
    """
    if config.init_from is None:
        return config
    file = local_file(config.init_from)
    if Path(config.init_from).is_dir():
        config = dataclasses.replace(config, init_from=str(file))
    sha256 = sha256_of(file)
    if config.init_sha256 not in (None, sha256):
        raise ValueError(
            f"--init-from {config.init_from} has sha256 {sha256}, expected {config.init_sha256} (according to the "
            "configuration); this is another snapshot"
        )
    header = open_weights(file).header
    if "kind" in config.network and config.network_kind != header.network:
        raise ValueError(
            f"--init-from {config.init_from} is a network of kind {header.network!r}; the configuration asks for "
            f"{config.network['kind']!r}. Change one of them"
        )
    known = NETWORKS[header.network].defaults
    theirs = {name: value for name, value in header.architecture.items() if name in known}
    network = {**theirs, **config.network}
    if header.network != DEFAULT_NETWORK:
        network["kind"] = header.network
    return dataclasses.replace(config, init_sha256=sha256, network=network)


def check_source(config: TrainConfig, run_header: Header) -> list[str]:
    """Check that the network of `run_header` can start from `config.init_from`, and return notices for the user.

    Reads no weights. Other labels are allowed. Raises ValueError that names the first thing that does not fit.
    """
    if config.init_from is None:
        return []
    source = open_weights(config.init_from)
    header, where = source.header, f"--init-from {config.init_from}"
    ours_header = dataclasses.replace(header, architecture=run_header.architecture, label_names=run_header.label_names)
    net = network_on_meta(ours_header, "this run")
    theirs_net = network_on_meta(header, where)
    for what, ours, theirs in (
        ("resolution", net.img_resolution, theirs_net.img_resolution),
        ("number of channels", net.img_channels, theirs_net.img_channels),
        ("sigma_data", net.sigma_data, theirs_net.sigma_data),
        ("encoder", _latent_space(config.encoder), _latent_space(header.encoder)),
    ):
        if ours != theirs:
            raise ValueError(f"{where} does not fit: its {what} is {theirs}, this run's {ours}")
    wanted, label_weights = net.state_dict(), NETWORKS[header.network].label_weights
    added = (label_weights, *AUGMENTATION_WEIGHTS)
    for name in {**wanted, **source.tensors}:
        shape = tuple(wanted[name].shape) if name in wanted else "missing"
        their_shape = tuple(source.tensors[name].shape) if name in source.tensors else "missing"
        if shape != their_shape and not name.endswith(added):
            raise ValueError(
                f"{where} does not fit: its {name} is {their_shape}, this run's {shape}; leave out network arguments "
                "such as --channels and --preset to use those of the snapshot"
            )
    notices = [
        f"starting from {source.name}: {header.nimg} images, EMA length {header.ema_std}; counting restarts at 0"
    ]
    old, new = theirs_net.label_dim, net.label_dim
    if old != new:
        notices.append(f"it has {old} classes, this run {new}: the label embedding starts at random")
    elif new and header.label_kind != run_header.label_kind:
        notices.append(f"its labels are {header.label_kind}, this run's {run_header.label_kind}; its embedding is kept")
    elif header.label_names and run_header.label_names and header.label_names != run_header.label_names:
        notices.append("its classes have other names; their embeddings are kept, in the same order")
    return notices


@torch.no_grad()
def start_from_(net: Preconditioner, source: str) -> None:
    """Copy the weights of the snapshot `source` into `net`, except for a label embedding of another size."""
    snapshot = load_snapshot(source)
    state, label_weights = snapshot.net.state_dict(), NETWORKS[snapshot.header.network].label_weights
    for name, tensor in net.state_dict().items():
        if name.endswith(AUGMENTATION_WEIGHTS) and name not in state:
            continue  # starts without effect
        if not name.endswith(label_weights) or (name in state and state[name].shape == tensor.shape):
            tensor.copy_(state[name])


def _latent_space(encoder: Mapping[str, Any]) -> dict[str, Any]:
    # the location of the VAE's files does not change the latents
    return {key: value for key, value in make_encoder(encoder).spec().items() if key != "vae_name"}
