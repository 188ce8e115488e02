"""Signals and time limits stop a command cleanly."""

import os
import signal

import pytest

from edm2kit.torch_utils.stopping import interrupt_on_sigterm


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
