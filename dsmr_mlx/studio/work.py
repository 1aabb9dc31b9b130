"""What a job of the engine works with, and what it tells the clients."""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from dsmr_mlx.generation.player import Player
from dsmr_mlx.studio.models import LoadedModel, Models
from dsmr_mlx.studio.session import Session
from dsmr_mlx.studio.states import Interrupted, States

SECONDS_BETWEEN_STATUS = 0.25


@dataclass(frozen=True)
class Status:
    """The fields of the message `status`, see `docs/studio-protocol.md`."""

    activity: str = "idle"
    text: str = ""
    progress: float | None = None
    takes: list[int] = field(default_factory=list)
    speed: float | None = None
    turn: str | None = None
    recording: bool = False

    def message(self) -> dict[str, Any]:
        """The message."""
        return {"type": "status"} | asdict(self)


IDLE = Status()
LISTENING = Status("listening", "recording what is played", recording=True)


@dataclass
class Work:
    """What the engine's thread has: the open session, models and states, and the way to the clients.

    publish(message): thread-safe, does not block. status: what the engine does; recording: whether `listen` is on
    """

    session: Session
    models: Models
    states: States
    publish: Callable[[dict[str, Any]], None]
    status: Status = IDLE
    recording: bool = False
    _shown: float = 0.0
    _publishing: threading.Lock = field(default_factory=threading.Lock)  # so that the last message is the newest status

    @property
    def whole_status(self) -> Status:
        """What is being done, by the engine and by `listen`."""
        if self.recording and self.status is IDLE:
            return LISTENING
        return replace(self.status, recording=self.recording)

    def show_status(self) -> None:
        """Tell the clients what is being done."""
        with self._publishing:
            self.publish(self.whole_status.message())

    def show(self, activity: str, text: str = "", **more: Any) -> None:
        """Tell the clients what is being done; often repeated texts are left out."""
        status, now = Status(activity, text, **more), time.monotonic()
        same = (status.activity, status.takes, status.turn) == (
            self.status.activity,
            self.status.takes,
            self.status.turn,
        )
        self.status = status
        if not same or now - self._shown >= SECONDS_BETWEEN_STATUS:
            self._shown = now
            self.show_status()

    def load(self, name: str | None) -> LoadedModel:
        """Load a model, and tell the clients when its abilities are known."""
        begun = []

        def loading(name: str) -> None:
            begun.append(name)
            self.show("loading", f"loading {name}")

        loaded = self.models.load(name, loading)
        if begun:
            self.states.forget_others(self.models.keys)
            self.publish({"type": "models", "models": self.models.describe()})
        return loaded

    def player_at(self, loaded: LoadedModel, ids: np.ndarray, stop: "Stop") -> Player:
        """Return a player that has read `ids` `(T,)`, see `States.player_at`, and tell the clients of the progress.

        Raises `Interrupted` if it is stopped.
        """

        def progress(done: int, total: int) -> None:
            stop.check()
            self.show("reading", "reading the music", progress=done / total)

        return self.states.player_at(loaded, ids, self.session.store, progress)


def described(error: BaseException) -> str:
    """One line for an error of the program itself."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


class Stop:
    """Whether a job should end; any thread may set it.

    begun: whether the job has added its takes
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self.begun = self._cancelled = False

    def set(self) -> None:
        """Ask the job to end."""
        self._event.set()

    def is_set(self) -> bool:
        """Whether the job should end."""
        return self._event.is_set()

    def cancel(self) -> None:
        """Ask a job that has not begun to end without adding takes. Called, as `begin`, within the session's lock."""
        self._cancelled = True
        self.set()

    def begin(self) -> None:
        """Note that the job adds its takes. Raises `Interrupted` if it was cancelled."""
        if self._cancelled:
            raise Interrupted
        self.begun = True

    def check(self) -> None:
        """Raise `Interrupted` if the job should end."""
        if self._event.is_set():
            raise Interrupted


class Job(Protocol):
    """Something that the engine does. request, client: who wants to know when it is finished."""

    stop: Stop

    def run(self, work: Work) -> int | None:
        """Do it. Return the first new take, or None. Raises `Interrupted` if stopped with nothing made."""
        ...
