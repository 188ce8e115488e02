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
