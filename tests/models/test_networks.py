import dataclasses

import pytest

from edm2kit.models import networks


def test_a_registered_kind_is_found_and_its_name_not_given_twice(monkeypatch):
    monkeypatch.setattr(networks, "NETWORKS", dict(networks.NETWORKS))
    kind = dataclasses.replace(networks.NETWORKS["edm2"])
    networks.register_network("mine", kind)
    networks.register_network("mine", kind)
    assert networks.network_kind({"kind": "mine"}) == "mine"
    with pytest.raises(ValueError, match="'edm2' exists already"):
        networks.register_network("edm2", kind)
