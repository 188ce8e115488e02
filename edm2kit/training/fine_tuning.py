"""Fine-tuning: starting from the weights of another run."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from edm2kit.models.edm2 import Precond, UNet
from edm2kit.models.encoders import make_encoder
from edm2kit.snapshots.file_format import build_network, load_snapshot
from edm2kit.snapshots.weights import Weights, open_weights
from edm2kit.torch_utils.files import fetch, sha256_of
from edm2kit.training.config import TrainConfig

_LABELS = "unet.emb_label.weight"  # the one tensor that depends on the classes


def adopt_source(config: TrainConfig) -> TrainConfig:
    """`config` with the hash of its `init_from`, and the network arguments of that snapshot where it sets none.

    Unchanged if `init_from` is None. Raises ValueError if that is not a snapshot, or not the one of `init_sha256`.
    """
    if config.init_from is None:
        return config
    sha256 = sha256_of(fetch(config.init_from))
    if config.init_sha256 not in (None, sha256):
        raise ValueError(
            f"--init-from {config.init_from} has sha256 {sha256}, expected {config.init_sha256} (according to the "
            "configuration); this is another snapshot"
        )
    known = inspect.signature(UNet).parameters.keys() - {"img_resolution", "img_channels", "label_dim"}
    theirs = {
        name: value for name, value in open_weights(config.init_from).header.architecture.items() if name in known
    }
    return dataclasses.replace(config, init_sha256=sha256, network={**theirs, **config.network})


def check_source(
    config: TrainConfig, architecture: Mapping[str, Any], label_names: tuple[str, ...] | None
) -> list[str]:
    """Check that a network of `architecture` can start from `config.init_from`, and return notices for the user.

    Reads no weights. Other classes are allowed. Raises ValueError that names the first thing that does not fit.
    """
    if config.init_from is None:
        return []
    source = open_weights(config.init_from)
    header, where = source.header, f"--init-from {config.init_from}"
    net = build_network(dataclasses.replace(header, architecture=architecture), "this run")
    theirs_net = build_network(header, where)
    for what, ours, theirs in (
        ("resolution", net.img_resolution, theirs_net.img_resolution),
        ("number of channels", net.img_channels, theirs_net.img_channels),
        ("sigma_data", net.sigma_data, theirs_net.sigma_data),
        ("encoder", _latent_space(config.encoder), _latent_space(header.encoder)),
    ):
        if ours != theirs:
            raise ValueError(f"{where} does not fit: its {what} is {theirs}, this run's {ours}")
    _check_shapes(where, source, net.state_dict())
    notices = [
        f"starting from {source.name}: {header.nimg} images, EMA length {header.ema_std}; counting restarts at 0"
    ]
    old, new = theirs_net.label_dim, net.label_dim
    if old != new:
        notices.append(f"it has {old} classes, this run {new}: the label embedding starts at random")
    elif new and header.label_names and label_names and tuple(header.label_names) != tuple(label_names):
        notices.append("its classes have other names; their embeddings are kept, in the same order")
    return notices


@torch.no_grad()
def start_from_(net: Precond, source: str) -> None:
    """Copy the weights of the snapshot `source` into `net`, except for a label embedding of another size."""
    state = load_snapshot(source).net.state_dict()
    for name, tensor in net.state_dict().items():
        if name != _LABELS or (name in state and state[name].shape == tensor.shape):
            tensor.copy_(state[name])


def _check_shapes(where: str, source: Weights, wanted: Mapping[str, torch.Tensor]) -> None:
    for name in {**wanted, **source.tensors}:
        if name == _LABELS:
            continue
        ours = tuple(wanted[name].shape) if name in wanted else "missing"
        theirs = tuple(source.tensors[name].shape) if name in source.tensors else "missing"
        if ours != theirs:
            raise ValueError(
                f"{where} does not fit: its {name} is {theirs}, this run's {ours}; leave out network arguments such "
                "as --channels and --preset to use those of the snapshot"
            )


def _latent_space(encoder: Mapping[str, Any]) -> dict[str, Any]:
    # the location of the VAE's files does not change the latents
    return {key: value for key, value in make_encoder(encoder).spec().items() if key != "vae_name"}
