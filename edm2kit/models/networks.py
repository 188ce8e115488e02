"""The kinds of networks that can be trained, stored and guided, by name."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from edm2kit.models.dit import DIT_DEFAULTS, build_dit, freeze_dit_
from edm2kit.models.edm2 import Precond, UNet, count_blocks, freeze_
from edm2kit.models.preconditioning import NetworkKind, Preconditioner

DEFAULT_NETWORK = "edm2"


def keyword_defaults(network: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of `network` that have defaults, with these."""
    parameters = inspect.signature(network).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


NETWORKS: dict[str, NetworkKind] = {
    "edm2": NetworkKind(
        build=Precond,
        defaults=keyword_defaults(UNet),
        added=frozenset(["augment_dim"]),
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


def full_architecture(
    img_resolution: int, img_channels: int, label_dim: int, sigma_data: float, network: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments of `NETWORKS[kind].build`, for the kind that `network` names; see `NetworkKind.full_architecture`.

    Raises ValueError for an unknown kind or argument.
    """
    kind = network_kind(network)
    NETWORKS[kind].check_arguments(network, kind)
    return NETWORKS[kind].full_architecture(img_resolution, img_channels, label_dim, sigma_data, network)


def build_network(architecture: Mapping[str, Any], kind: str = DEFAULT_NETWORK) -> Preconditioner:
    """A network with random weights: `architecture` as from `full_architecture`.

    Raises ValueError for an unknown kind, and as its `build` does.
    """
    return NETWORKS[network_kind({"kind": kind})].build(**architecture)
