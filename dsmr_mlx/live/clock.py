"""Clocks, real and virtual, and the event queue of a session."""

import contextvars
import math
import threading
import time
from abc import ABC, abstractmethod
from queue import Empty, SimpleQueue
from typing import Any, Protocol

MAX_EVENTS = 4000  # of the inputs, in the queue
ROOM_SECONDS = 0.002  # between two checks for room in the queue
JOIN_SECONDS = 2.0  # a thread may be blocked in a system call


class TimedTask(Protocol):
    """A task that acts at times it chooses. `changed` guards it and is notified when it has to act earlier."""

    changed: threading.Condition

    def due(self) -> float:
        """Return the time of the next action in seconds of the clock, or inf if none is due."""
        ...

    def act(self, now: float) -> None:
        """Do what is due at `now`."""
        ...


class Clock(ABC):
    """A monotonic clock in seconds with an event queue: any thread posts, one thread waits."""

    def __init__(self) -> None:
        self._queue: SimpleQueue = SimpleQueue()  # reentrant: a signal handler may post during `get`

    @abstractmethod
    def now(self) -> float:
        """Return the seconds since some point in the past."""

    @abstractmethod
    def schedule(self, task: TimedTask) -> None:
        """Run a task at its times, from now until `close`."""

    @abstractmethod
    def wait(self, until: float) -> list[Any]:
        """Wait for events until a time. Return all that are queued, in order; [] if the time is reached first."""

    def post(self, event: Any) -> None:
        """Put an event into the queue."""
        self._queue.put(event)

    def post_input(self, event: Any) -> None:
        """Post an event from a human or another program, of which any number may come.

        A real clock makes the sender wait while twice `MAX_EVENTS` are queued, so that memory is bounded.
        """
        self.post(event)

    @property
    def is_crowded(self) -> bool:
        """Whether more events are queued than any instrument sends while the session computes."""
        return False

    def _drain(self) -> list[Any]:
        return [self._queue.get_nowait() for _ in range(self._queue.qsize())]

    @abstractmethod
    def close(self) -> None:
        """Stop all tasks."""


class RealClock(Clock):
    """The system's monotonic clock. Each task has a thread; if it fails, its exception is posted."""

    def __init__(self) -> None:
        super().__init__()
        self._closed = False
        self._tasks: list[tuple[TimedTask, threading.Thread]] = []

    def now(self) -> float:
        """See `Clock`."""
        return time.monotonic()

    def post_input(self, event: Any) -> None:
        """See `Clock`."""
        while self._queue.qsize() >= 2 * MAX_EVENTS and not self._closed:
            time.sleep(ROOM_SECONDS)
        self.post(event)

    @property
    def is_crowded(self) -> bool:
        """See `Clock`."""
        return self._queue.qsize() >= MAX_EVENTS

    def schedule(self, task: TimedTask) -> None:
        """See `Clock`."""
        run = contextvars.copy_context().run  # the thread writes files that the command has claimed
        thread = threading.Thread(target=run, args=(self._run, task), daemon=True)
        self._tasks.append((task, thread))
        thread.start()

    def _run(self, task: TimedTask) -> None:
        try:
            while not self._closed:
                task.act(self.now())
                with task.changed:
                    seconds = task.due() - self.now()
                    if seconds > 0 and not self._closed:
                        task.changed.wait(min(seconds, threading.TIMEOUT_MAX))
        except Exception as error:  # any failure must reach the thread that runs the session
            self.post(error)

    def wait(self, until: float) -> list[Any]:
        """See `Clock`."""
        seconds = until - self.now()
        if seconds <= 0:
            return self._drain()
        try:
            return [self._queue.get(timeout=min(seconds, threading.TIMEOUT_MAX)), *self._drain()]
        except Empty:
            return []

    def close(self) -> None:
        """See `Clock`."""
        self._closed = True
        for task, _ in self._tasks:
            with task.changed:
                task.changed.notify_all()
        for _, thread in self._tasks:
            thread.join(JOIN_SECONDS)


class VirtualClock(Clock):
    """A clock that jumps to the next event instead of waiting, so that every run has the same order of events."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._tasks: list[TimedTask] = []

    def now(self) -> float:
        """See `Clock`."""
        return self._now

    def schedule(self, task: TimedTask) -> None:
        """See `Clock`."""
        self._tasks.append(task)

    def wait(self, until: float) -> list[Any]:
        """See `Clock`. Raises `RuntimeError` if `until` is inf and no task is due."""
        while self._queue.empty() and self.step(until):
            pass
        if events := self._drain():
            return events
        if until == math.inf:
            raise RuntimeError("virtual clock: nothing to wait for")
        self._now = max(self._now, until)
        return []

    def step(self, until: float) -> bool:
        """Jump to the next due task and run it. Return False if none is due by `until`."""
        task = min(self._tasks, key=lambda task: task.due(), default=None)
        if task is None or task.due() > until or task.due() == math.inf:
            return False
        self._now = max(self._now, task.due())
        task.act(self._now)
        return True

    def close(self) -> None:
        """See `Clock`."""
        self._tasks.clear()
