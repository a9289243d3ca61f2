"""When an interrupt is heard: at once, or where a piece of work is whole."""

import signal
import sys

import pytest

from router_r1_jax.cli import Interrupts


@pytest.fixture
def interrupts():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Interrupts()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_work_that_must_be_whole_and_a_second_one_does_not(interrupts, number):
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    interrupts = Interrupts()
    interrupts.hold()
    signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
        interrupts.let_go()
    interrupts = Interrupts()
    interrupts.hold()
    signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


def test_work_that_nobody_interrupts_goes_on(interrupts):
    interrupts.hold()
    interrupts.let_go()


def test_an_interrupt_that_python_drops_is_raised_again(interrupts, monkeypatch):
    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: dropped.append(unraisable.exc_type))

    class Dropped:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    Dropped()
    assert dropped == [KeyboardInterrupt]
    with pytest.raises(KeyboardInterrupt):
        interrupts.let_go()


def test_a_background_job_goes_on_ignoring_ctrl_c(interrupts):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Interrupts().hold()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
