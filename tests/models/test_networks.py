"""The kinds of networks by name, and their complete architectures."""

import dataclasses

import pytest
import torch

from edm2kit.models import NETWORKS, Precond, build_network, full_architecture, network_kind, networks


def test_an_architecture_is_complete_and_plain():
    architecture = full_architecture(64, 4, 1000, 0.5, {"model_channels": 128})
    assert architecture["img_resolution"] == 64
    assert architecture["model_channels"] == 128
    assert architecture["channel_mult"] == [1, 2, 3, 4]  # defaults are written out, tuples as lists
    assert architecture["logvar_channels"] == 128
    named = full_architecture(64, 4, 1000, 0.5, {"kind": "edm2", "model_channels": 128})
    assert named == architecture
    with torch.device("meta"):
        net, same = build_network(architecture), Precond(64, 4, 1000, model_channels=128)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in same.state_dict().items()}


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_kind_builds_from_its_defaults_alone(kind):
    architecture = full_architecture(64, 4, 10, 0.5, {"kind": kind})
    with torch.device("meta"):
        net = build_network(architecture, kind)
    assert (net.img_resolution, net.img_channels, net.label_dim, net.sigma_data) == (64, 4, 10, 0.5)
    assert NETWORKS[kind].count_blocks(architecture) <= len(net.raw.blocks)
    depend_on_classes = [name for name in net.state_dict() if name.endswith(NETWORKS[kind].label_weights)]
    assert depend_on_classes
    with torch.device("meta"):
        other = build_network({**architecture, "label_dim": 7}, kind).state_dict()
    differing = [name for name, value in net.state_dict().items() if other[name].shape != value.shape]
    assert differing == depend_on_classes


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        ({"kind": "unet"}, "unknown kind of network 'unet'; known kinds: edm2, dit"),
        ({"model_chanels": 64}, r"unknown network argument 'model_chanels' \(edm2\); did you mean 'model_channels'?"),
        ({"xyzzy": 1}, r"unknown network argument 'xyzzy' \(edm2\); available: model_channels"),
        ({"kind": "dit", "model_channels": 64}, r"unknown network argument 'model_channels' \(dit\)"),
    ],
)
def test_unknown_kinds_and_arguments_are_refused(network, reason):
    with pytest.raises(ValueError, match=reason):
        full_architecture(64, 4, 10, 0.5, network)


def test_the_kind_may_be_left_out():
    assert network_kind({}) == "edm2"
    assert network_kind({"kind": "dit"}) == "dit"


def test_a_registered_kind_is_found_and_its_name_not_given_twice(monkeypatch):
    monkeypatch.setattr(networks, "NETWORKS", dict(networks.NETWORKS))
    kind = dataclasses.replace(networks.NETWORKS["edm2"])
    networks.register_network("mine", kind)
    networks.register_network("mine", kind)
    assert networks.network_kind({"kind": "mine"}) == "mine"
    with pytest.raises(ValueError, match="'edm2' exists already"):
        networks.register_network("edm2", kind)
