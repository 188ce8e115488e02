"""The kinds of networks that can be trained, stored and guided, by name."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from edm2kit.models.dit import DIT_DEFAULTS, build_dit, freeze_dit_
from edm2kit.models.edm2 import Precond, UNet, count_blocks, freeze_
from edm2kit.models.layers import normalize_weights_
from edm2kit.models.preconditioning import Preconditioner

DEFAULT_NETWORK = "edm2"
_LOGVAR_CHANNELS = 128


def evaluation_only_(net: nn.Module) -> nn.Module:
    """Switch to eval mode, without gradients of weights; returns `net`."""
    return net.eval().requires_grad_(False)


@dataclass(frozen=True)
class NetworkKind:
    """How to make, train and evaluate one kind of network.

    - `build(img_resolution, img_channels, label_dim, sigma_data, logvar_channels, **arguments)` returns the denoiser;
      raises ValueError or TypeError for arguments that do not fit.
    - `defaults` holds every argument of its own with its default, so that snapshots record the complete architecture.
    - `label_weights` is the end of the names of the weights whose shape depends on the number of classes. Fine-tuning
      on other classes starts these at random.
    - `count_blocks(architecture)` is the number of blocks that `build` would make; a damaged file may ask for billions.
    - `normalize_weights_(net)` is called before each training step. By default it normalises `MPConv` layers, as the
      uncertainty head of `Preconditioner` has one, and leaves all others.
    - `freeze_(net)` prepares a network for evaluation only, in `net.compute_dtype`, and returns it. By default it turns
      on eval mode and turns off gradients.
    """

    build: Callable[..., Preconditioner]
    defaults: Mapping[str, Any]
    label_weights: str
    count_blocks: Callable[[Mapping[str, Any]], int]
    normalize_weights_: Callable[[nn.Module], None] = normalize_weights_
    freeze_: Callable[[Any], Any] = evaluation_only_


def keyword_defaults(network: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of `network` that have defaults, with these."""
    parameters = inspect.signature(network).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


NETWORKS: dict[str, NetworkKind] = {
    "edm2": NetworkKind(
        build=Precond,
        defaults=keyword_defaults(UNet),
        label_weights=".emb_label.weight",
        count_blocks=count_blocks,
        freeze_=freeze_,
    ),
    "dit": NetworkKind(
        build=build_dit,
        defaults=DIT_DEFAULTS,
        label_weights=".class_embedder.weight",
        count_blocks=lambda architecture: architecture["num_layers"],
        freeze_=freeze_dit_,
    ),
}


def register_network(name: str, kind: NetworkKind) -> None:
    """Make a kind of network available as `name`: in configurations (`network: {kind: name}`) and in snapshots.

    Registering the same kind again does nothing. Raises ValueError if the name is taken by another kind.
    """
    if NETWORKS.setdefault(name, kind) is not kind:
        raise ValueError(f"a kind of network called {name!r} exists already; choose another name")


def network_kind(network: Mapping[str, Any]) -> str:
    """The kind that a configuration's `network` mapping names with its key `kind`; "edm2" if it names none.

    Raises ValueError for an unknown kind.
    """
    kind = network.get("kind", DEFAULT_NETWORK)
    if kind not in NETWORKS:
        raise ValueError(f"unknown kind of network {kind!r}; known kinds: {', '.join(NETWORKS)}")
    return kind


def check_network_arguments(network: Mapping[str, Any]) -> None:
    """Raise ValueError for a key of `network` (a configuration's mapping) that its kind of network does not take."""
    kind = network_kind(network)
    known = [*NETWORKS[kind].defaults, "logvar_channels"]
    for name in network:
        if name == "kind" or name in known:
            continue
        close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else f"available: {', '.join(known)}"
        raise ValueError(f"unknown network argument {name!r} ({kind}); {hint}")


def full_architecture(
    img_resolution: int, img_channels: int, label_dim: int, sigma_data: float, network: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments of `NETWORKS[kind].build`, defaults written out, so that a later default changes nothing.

    `network` holds the arguments that differ from their defaults, and possibly `kind`. Values are plain lists and
    numbers. Raises ValueError for an unknown kind or argument.
    """
    check_network_arguments(network)
    architecture = {
        "img_resolution": img_resolution,
        "img_channels": img_channels,
        "label_dim": label_dim,
        "sigma_data": sigma_data,
        "logvar_channels": _LOGVAR_CHANNELS,
        **NETWORKS[network_kind(network)].defaults,
        **network,
    }
    architecture.pop("kind", None)
    return {name: list(value) if isinstance(value, tuple | list) else value for name, value in architecture.items()}


def build_network(architecture: Mapping[str, Any], kind: str = DEFAULT_NETWORK) -> Preconditioner:
    """A network with random weights: `architecture` as from `full_architecture`.

    Raises ValueError for an unknown kind, and as its `build` does.
    """
    return NETWORKS[network_kind({"kind": kind})].build(**architecture)
