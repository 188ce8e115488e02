"""Jobs on several machines: names that lead nowhere are reported before the processes wait for each other."""

import socket

import pytest

from edm2kit.torch_utils import dist, meeting


@pytest.fixture
def machines(monkeypatch):
    """Two machines with 8 processes each; this one is called node1 and resolves to what the test says."""

    def resolve(address):
        def lookup(name):
            assert name == "node1"
            if address is None:
                raise socket.gaierror(-2, "Name or service not known")
            return address

        monkeypatch.setattr(socket, "gethostbyname", lookup)

    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "node1")
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "ib0")])
    return resolve


@pytest.mark.parametrize(("address", "reason"), [("127.0.1.1", "resolves to 127.0.1.1"), (None, "has no address")])
def test_a_name_that_others_cannot_reach_is_reported_with_the_interfaces(machines, address, reason):
    machines(address)
    with pytest.raises(ValueError, match=f"node1, {reason}.*GLOO_SOCKET_IFNAME.*here: eth0, ib0"):
        meeting.check_host_name()


def test_the_session_reports_it_before_it_waits_for_others(machines, monkeypatch):
    machines("127.0.0.1")
    monkeypatch.setattr(dist.torch.distributed, "init_process_group", lambda *args, **settings: pytest.fail("waited"))
    with pytest.raises(ValueError, match="spans several machines"), dist.session("cpu"):
        pass


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({}, "10.0.0.7"),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, "127.0.1.1"),
        ({"LOCAL_WORLD_SIZE": "16"}, "127.0.1.1"),  # all on this machine
        ({"LOCAL_WORLD_SIZE": ""}, "127.0.1.1"),  # unknown
    ],
)
def test_other_jobs_are_left_alone(machines, monkeypatch, variables, address):
    machines(address)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    meeting.check_host_name()


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'; expected a number"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999; expected a port from 1 to 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is 0; expected a port from 1 to 65535"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE 2, but ranks count from 0 up"),
        ({"RANK": "-1"}, "RANK is '-1'; expected a number"),
    ],
)
def test_ranks_and_ports_that_cannot_be_are_named_before_anybody_waits(monkeypatch, variables, reason):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=reason):
        meeting.check_variables()


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR"])
def test_a_variable_that_is_missing_is_named(monkeypatch, name):
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", name: ""}
    for variable, value in group.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(
        ValueError, match=rf"^WORLD_SIZE is 2, but {name} is not set\. Start the processes with torchrun"
    ):
        meeting.check_variables()


@pytest.mark.parametrize("name", ["cpu:abc", "cpu:", "cpu:-1", "CPU", ""])
def test_a_device_that_cannot_be_is_named(name):
    with pytest.raises(ValueError, match=f"--device {name}: not available here"):
        dist.pick_device(name)
