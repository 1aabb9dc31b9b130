"""Stopping in good order: the first Ctrl-C asks, the second insists."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

ENDS = ("SIGINT", "SIGTERM")


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second signal ends the program at once."""
    event = threading.Event()

    def request(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    with handled(request):
        yield event


@contextmanager
def handled(handler: Any, names: Sequence[str] = ENDS) -> Iterator[None]:
    """Have a handler for the signals of these names; without effect but in the main thread.

    A SIGHUP that is ignored stays so: that is what nohup is for.
    """
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup in numbers and signal.getsignal(hangup) == signal.SIG_IGN:
        numbers.remove(hangup)
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
