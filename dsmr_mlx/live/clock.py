"""Time, real or virtual, and the box into which everything is put that happens."""

import math
import threading
import time
from abc import ABC, abstractmethod
from queue import Empty, SimpleQueue
from typing import Any, Protocol

SECONDS_TO_END = 2.0  # for a thread that may be waiting for the system


class Timed(Protocol):
    """Something that acts at times of its own. `changed` guards it, and is notified when it has to act earlier."""

    changed: threading.Condition

    def due(self) -> float:
        """When it is to act next, seconds of the clock; inf: not until something changes."""
        ...

    def act(self, now: float) -> None:
        """Do what is due at `now`."""
        ...


class Clock(ABC):
    """Seconds that never go back. Any thread posts, one thread waits."""

    def __init__(self) -> None:
        self._box: SimpleQueue = SimpleQueue()  # its put may interrupt its get: signal handlers post too

    @abstractmethod
    def now(self) -> float:
        """Seconds since some point in the past."""

    @abstractmethod
    def serve(self, timed: Timed) -> None:
        """Let it act at its times, from now until `close`."""

    @abstractmethod
    def wait(self, until: float) -> list[Any]:
        """All that was posted, in order, as soon as there is anything; [] if there is nothing by the time `until`."""

    def post(self, item: Any) -> None:
        """Put something into the box."""
        self._box.put(item)

    def _posted(self) -> list[Any]:
        return [self._box.get_nowait() for _ in range(self._box.qsize())]

    @abstractmethod
    def close(self) -> None:
        """Nothing acts any more after this."""


class RealClock(Clock):
    """The system's monotonic clock; what is served acts in a thread each. A thread that fails posts its exception."""

    def __init__(self) -> None:
        super().__init__()
        self._closed = False
        self._served: list[tuple[Timed, threading.Thread]] = []

    def now(self) -> float:
        """See `Clock`."""
        return time.monotonic()

    def serve(self, timed: Timed) -> None:
        """See `Clock`."""
        thread = threading.Thread(target=self._run, args=(timed,), daemon=True)
        self._served.append((timed, thread))
        thread.start()

    def _run(self, timed: Timed) -> None:
        try:
            while not self._closed:
                timed.act(self.now())
                with timed.changed:
                    seconds = timed.due() - self.now()
                    if seconds > 0 and not self._closed:
                        timed.changed.wait(min(seconds, threading.TIMEOUT_MAX))
        except Exception as error:  # whatever it is, the thread that runs the session is to know it
            self.post(error)

    def wait(self, until: float) -> list[Any]:
        """See `Clock`."""
        seconds = until - self.now()
        if seconds <= 0:
            return self._posted()
        try:
            return [self._box.get(timeout=min(seconds, threading.TIMEOUT_MAX)), *self._posted()]
        except Empty:
            return []

    def close(self) -> None:
        """See `Clock`."""
        self._closed = True
        for timed, _ in self._served:
            with timed.changed:
                timed.changed.notify_all()
        for _, thread in self._served:
            thread.join(SECONDS_TO_END)


class VirtualClock(Clock):
    """Time that passes only while it is waited for, at once: the same events in the same order, every time."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._served: list[Timed] = []

    def now(self) -> float:
        """See `Clock`."""
        return self._now

    def serve(self, timed: Timed) -> None:
        """See `Clock`."""
        self._served.append(timed)

    def wait(self, until: float) -> list[Any]:
        """See `Clock`."""
        while self._box.empty() and self.step(until):
            pass
        if posted := self._posted():
            return posted
        if until == math.inf:
            raise RuntimeError("a virtual clock was to wait for nothing")
        self._now = max(self._now, until)
        return []

    def step(self, until: float) -> bool:
        """Go to the next time at which something acts, and let it; False if that is later than `until`."""
        timed = min(self._served, key=lambda timed: timed.due(), default=None)
        if timed is None or timed.due() > until or timed.due() == math.inf:
            return False
        self._now = max(self._now, timed.due())
        timed.act(self._now)
        return True

    def close(self) -> None:
        """See `Clock`."""
        self._served.clear()
