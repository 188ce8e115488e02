"""Signals and time limits stop a command cleanly."""

import os
import signal

import pytest

from edm2kit.torch_utils.stopping import StopRequest, interrupt_on_sigterm, parse_duration_sec


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_interrupts_and_later_sigterms_do_not(first):
    before, interrupted = handlers(), 0
    with interrupt_on_sigterm():
        for number in (first, signal.SIGTERM, signal.SIGTERM):
            try:
                send(number)
            except KeyboardInterrupt:
                interrupted += 1
    assert interrupted == 1
    assert handlers() == before


def test_a_second_ctrl_c_interrupts_again():
    with interrupt_on_sigterm():
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)


def test_an_ignored_ctrl_c_stays_ignored():
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt_on_sigterm():
            send(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGTERM)
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, former)


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
