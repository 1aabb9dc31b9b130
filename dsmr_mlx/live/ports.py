"""MIDI devices, through mido and the library that it uses, python-rtmidi if nothing else is set."""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import mido
from mido import Message

from dsmr_mlx.common.errors import UserError

SECONDS_BETWEEN_LOOKS = 2.0
INSTALL = "pip install 'dsmr-mlx[live]'"


class PortLost(Exception):
    """A port that worked does not any more; its text says which, and why."""


class Listener(Protocol):
    """What a source talks to, from any thread: `session.Session`."""

    clock: Any

    def receive(self, message: Message) -> None:
        """A message has come in."""
        ...

    def pass_turn(self) -> None:
        """The other one of the two is to play."""
        ...

    def finish(self) -> None:
        """There will be no more from a source, but the model may still answer."""
        ...

    def stop(self, reason: str) -> None:
        """The session is over."""
        ...


@contextmanager
def midi_system() -> Iterator[None]:
    """What goes wrong with the system's MIDI, as a `UserError`."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"MIDI ports: {error.name or error} cannot be imported, expected it after {INSTALL}; "
            "--socket, --listen and --in-file do without"
        ) from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"MIDI ports: {' '.join(str(error).split())}") from None


def port_names() -> tuple[list[str], list[str]]:
    """The names of the inputs and of the outputs. Raises `UserError` where the system has no MIDI."""
    with midi_system():
        return mido.get_input_names(), mido.get_output_names()


def find_port(option: str, name: str, names: Sequence[str]) -> str:
    """The port that a name, or a part of one in any case, stands for. Raises `UserError` if it is none, or several."""
    if name in names:
        return name
    found = sorted({n for n in names if name.lower() in n.lower()})
    if len(found) == 1:
        return found[0]
    what = f"one of {', '.join(map(repr, found))}" if found else f"one of {', '.join(map(repr, names)) or 'no ports'}"
    raise UserError(f"{option} {name}: {'several ports' if found else 'no such port'}, expected {what}")


class Source(Protocol):
    """What a session starts. plays: whether something may come from it, until it says `finish`, if it ever does."""

    plays: bool

    def start(self, listener: Listener) -> None:
        """Let a listener know of everything that comes in, and of the end."""
        ...


class DeviceInput:
    """An input of the system. Raises `UserError` if there is no such one, or it cannot be opened."""

    plays = True

    def __init__(self, name: str):
        self.name = find_port("--in", name, port_names()[0])
        self._receive: Callable[[Message], None] = lambda message: None
        with midi_system():
            self._port = mido.open_input(self.name, callback=lambda message: self._receive(message))

    def start(self, listener: Listener) -> None:
        """Let a listener know of everything that comes in, and of the end."""
        self._receive = listener.receive
        listener.clock.serve(Watch(self.name, lambda: port_names()[0], listener.stop))

    def close(self) -> None:
        """Let go of the port."""
        self._port.close()


class DeviceOutput:
    """An output of the system. Raises `UserError` if there is no such one, or it cannot be opened."""

    plays = False

    def __init__(self, name: str):
        self.name = find_port("--out", name, port_names()[1])
        with midi_system():
            self._port = mido.open_output(self.name)

    def start(self, listener: Listener) -> None:
        """Let a listener know of the end."""
        listener.clock.serve(Watch(self.name, lambda: port_names()[1], listener.stop))

    def send(self, message: Message) -> None:
        """Send a message. Raises `PortLost`."""
        try:
            self._port.send(message)
        except (OSError, RuntimeError, ValueError) as error:
            raise PortLost(f"{self.name}: {' '.join(str(error).split())}") from error

    def close(self) -> None:
        """Let go of the port."""
        self._port.close()


class Watch:
    """Looks now and then whether a device is still there: one that is unplugged just goes silent.

    It is served by a clock (`clock.Timed`).
    """

    def __init__(self, name: str, names: Callable[[], Sequence[str]], stop: Callable[[str], None]):
        self.name, self.names, self.stop = name, names, stop
        self.changed = threading.Condition()
        self._due = 0.0

    def due(self) -> float:
        """See `clock.Timed`."""
        return self._due

    def act(self, now: float) -> None:
        """See `clock.Timed`."""
        self._due = now + SECONDS_BETWEEN_LOOKS
        with contextlib.suppress(UserError):  # that nothing can be listed says nothing about this device
            if self.name not in self.names():
                self._due = math.inf
                self.stop(f"{self.name}: is not there any more")
