"""Signals at the command line."""

from __future__ import annotations

import signal

import pytest

from cluster.console import stop_signals


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_the_first_signal_ends_a_wait_for_input_and_the_second_is_told(
    number: signal.Signals, raised: type[BaseException]
) -> None:
    with stop_signals() as signals:
        signals.interrupt_on_first()
        with pytest.raises(raised):
            signal.raise_signal(number)
        assert signals.first.is_set()
        signal.raise_signal(number)  # on the way out: nothing is raised
        assert signals.second.is_set()


def test_signals_are_told_and_then_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.first.is_set() and not signals.second.is_set()
    assert signal.getsignal(signal.SIGTERM) == before
