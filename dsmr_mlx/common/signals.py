"""Stop cleanly on the first Ctrl-C, at once on the second."""

import os
import signal
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
ENDING_SIGNALS = ("SIGTERM", "SIGHUP", "SIGQUIT")  # Python itself turns SIGINT into an exception


class Ended(BaseException):
    """Raised by `end`, so that the program cleans up. signal: the signal received."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = signal.Signals(number)


def end(number: int, frame: object) -> None:
    """Handle a signal by raising `Ended`; further signals of this kind are ignored while the program ends."""
    signal.signal(number, signal.SIG_IGN)
    raise Ended(number)


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C and other `STOP_SIGNALS` set; a second signal raises `KeyboardInterrupt`."""
    event = threading.Event()

    def request(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    with handled(request):
        yield event


@contextmanager
def handled(handler: Any, names: Sequence[str] = STOP_SIGNALS) -> Iterator[None]:
    """Handle the signals of these names within the block; does nothing outside the main thread.

    Ignored terminal signals stay ignored, as nohup and shells without job control require. After a hang-up nothing
    more is printed to the terminal.
    """
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    of_terminal = [getattr(signal, name, None) for name in ("SIGINT", "SIGHUP", "SIGQUIT", "SIGTSTP")]
    numbers = [n for n in numbers if n not in of_terminal or signal.getsignal(n) != signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    previous = {number: signal.signal(number, _after_hang_up(handler, number)) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def blocked(names: Sequence[str] = ("SIGINT", "SIGHUP", "SIGQUIT")) -> Iterator[None]:
    """Let the signals of these names wait until the end of the block; processes begun within it never receive them."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _after_hang_up(handler: Any, number: int) -> Any:
    """Return the handler; on SIGHUP it first leaves the terminal, because printing to a closed one is an error."""
    if number != getattr(signal, "SIGHUP", None):
        return handler

    def handle(number: int, frame: object) -> None:
        leave_terminal()
        handler(number, frame)

    return handle


def leave_terminal() -> None:
    """Connect standard input, output and error to the null device, if they are a terminal."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        with suppress(OSError):  # it was closed before the start
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # `isatty` is false for a terminal that is gone
                os.dup2(null, descriptor)
    os.close(null)
