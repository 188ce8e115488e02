"""Running means, and asking a job to stop."""

import math
import os
import signal

import pytest
import torch

from edm2kit.torch_utils.stats import RunningStats
from edm2kit.torch_utils.stopping import StopRequest, parse_duration_sec


def test_means_and_counts_since_the_last_look():
    stats = RunningStats(torch.device("cpu"))
    assert stats.collect() == {}
    stats.add("a", torch.tensor([1.0, 2.0]))
    stats.add("a", 6.0)
    values = torch.tensor([1.0, float("inf"), 3.0])
    stats.add("b", values, where=torch.tensor([True, False, True]))
    stats.add("c", values, where=torch.zeros(3, dtype=torch.bool))
    means = stats.collect()
    assert means["a"] == (3.0, 3)
    assert means["b"] == (2.0, 2)
    assert means["c"][1] == 0
    assert math.isnan(means["c"][0])
    assert stats.collect() == {}


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("45m", 2700), (" 1.5h ", 5400), ("2d", 172800)])
def test_time_limits(text, seconds):
    assert parse_duration_sec(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "5w", "-1h", "0s", "h"])
def test_wrong_time_limits(text):
    with pytest.raises(ValueError, match="write for example"):
        parse_duration_sec(text)


def test_stop_is_asked_by_signal_or_by_time_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert StopRequest(max_sec=-1)()
    assert not StopRequest(max_sec=3600)()
