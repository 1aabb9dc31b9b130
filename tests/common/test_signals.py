"""Signals that a shell lets a program in the background ignore stay ignored."""

import signal

import pytest

from dsmr_mlx.common.signals import stop_requests


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGQUIT"])
@pytest.mark.parametrize("ignored", [True, False])
def test_ignored_signals_of_the_terminal_stay_ignored(name, ignored):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with stop_requests() as stop:
            signal.raise_signal(number)
            assert stop.is_set() != ignored
    finally:
        signal.signal(number, before)
