"""Stopping in good order: the first Ctrl-C asks, the second insists."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

ENDS = ("SIGINT", "SIGTERM")


@contextmanager
def stop_requests(
    call: Callable[[str], None] = lambda name: None, names: Sequence[str] = ENDS
) -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, or one of the signals `names`; a second signal ends the program at once.

    call: is told of the first one, by name, wherever the program is just then.
    """
    event = threading.Event()

    def request(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        call(signal.Signals(number).name)

    with handled(request, names):
        yield event


@contextmanager
def handled(handler: Any, names: Sequence[str] = ENDS) -> Iterator[None]:
    """Have a handler, or `signal.SIG_IGN`, for the signals of these names; without effect but in the main thread.

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
