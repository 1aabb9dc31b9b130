"""The one thread that uses MLX: it does one job after the other, each of which can be stopped between two tokens."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.studio.states import Interrupted
from dsmr_mlx.studio.work import IDLE, Job, Stop, Work, described

INTERRUPTED = 2  # background jobs that are taken up again; older ones are dropped

Finished = Callable[[int | None, str | None], None]  # (first new take, error)


@dataclass
class Task:
    """A job, and whom to tell when it is finished.

    background: it makes way for any other; over: it has been done, but nobody has been told yet
    """

    job: Job
    finished: Finished
    background: bool = False
    over: bool = False

    @property
    def is_prepared(self) -> bool:
        """Whether it will add takes, and has not yet."""
        return not (self.background or self.over or self.job.stop.begun)


class Engine:
    """A thread with a place for the job that it does and one for the next.

    unexpected(error): called for an error that is nobody's fault but the program's; the thread goes on.
    """

    def __init__(self, work: Work, unexpected: Callable[[BaseException], None]):
        self.work, self.unexpected = work, unexpected
        self._changed = threading.Condition()
        self._current: Task | None = None
        self._next: Task | None = None
        self._background: Task | None = None
        self._interrupted: deque[Task] = deque(maxlen=INTERRUPTED)
        self._draining = self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def job(self) -> Job | None:
        """The job that is being done, or is next; not one in the background."""
        with self._changed:
            task = self._next or self._current
            return None if task is None or task.background else task.job

    def submit(self, job: Job, finished: Finished) -> None:
        """Do a job next. What is being done is stopped, and what waits is not begun."""
        with self._changed:
            self._interrupt()
            self._drop()
            self._next = Task(job, finished)
            self._changed.notify_all()

    def prepare(self, job: Job) -> None:
        """Do a job in the background, as soon as there is nothing else to do. If it is interrupted, it is done again.

        While the engine is drained and after it is closed, nothing is done.
        """
        with self._changed:
            if self._draining or self._closed:
                return
            self._interrupt()
            self._background = Task(job, lambda take, error: None, background=True)
            self._changed.notify_all()

    def stop(self) -> None:
        """Stop what is being made and what waits."""
        with self._changed:
            self._drop()

    def cancel(self) -> bool:
        """Stop what has not added its takes yet, so that it adds none. Return whether there was something.

        Called within the session's lock.
        """
        with self._changed:
            prepared = [task for task in (self._current, self._next) if task is not None and task.is_prepared]
            for task in prepared:
                task.job.stop.cancel()
            if prepared:
                self._drop()
            return bool(prepared)

    def _interrupt(self) -> None:
        """Stop what is done in the background, to take it up again when there is nothing else to do."""
        task = self._current
        if task is not None and task.background and not task.job.stop.is_set():
            task.job.stop.set()
            self._interrupted.append(task)

    def _drop(self) -> None:
        if self._current is not None:
            self._current.job.stop.set()
        if self._next is not None:
            dropped, self._next = self._next, None
            dropped.finished(None, None)

    def drain(self) -> None:
        """Stop everything, and wait until nothing is being done."""
        with self._changed:
            self._drop()
            self._background, self._draining = None, True
            self._interrupted.clear()
            self._changed.wait_for(lambda: self._current is None)
            self._draining = False

    def close(self) -> None:
        """Stop everything, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.drain()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next or self._background or self._interrupted)
                if self._closed:
                    return
                if self._next is not None:
                    self._current, self._next = self._next, None
                elif self._background is not None:
                    self._current, self._background = self._background, None
                else:
                    self._current = self._interrupted.pop()
                    self._current.job.stop, self._current.over = Stop(), False
                task = self._current
            take, problem = self._do(task)
            task.over = True
            if self.work.status is not IDLE:
                self.work.status = IDLE
                self.work.show_status()
            task.finished(take, problem)
            with self._changed:
                self._current = None
                self._changed.notify_all()

    def _do(self, task: Task) -> tuple[int | None, str | None]:
        """Do a job. Return its first new take and what went wrong."""
        try:
            return task.job.run(self.work), None
        except Interrupted:
            return None, None
        except UserError as error:
            return None, str(error)
        except Exception as error:  # the thread must survive, and the clients be told
            self.unexpected(error)
            return None, described(error)
