"""The life of a run: stopping it by signal or time limit."""

import os
import signal

import pytest

from edm2kit.training.run import StopRequest, parse_duration_sec


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_every_signal_that_announces_the_end_asks_to_stop(number):
    with StopRequest() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_during_set_up_a_signal_ends_the_process(number):
    with pytest.raises(SystemExit) as ended, StopRequest():
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number


def test_nohup_is_respected():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, former)
