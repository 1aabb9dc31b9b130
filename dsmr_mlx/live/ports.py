"""The computer's MIDI devices, through mido and its backend, python-rtmidi unless another is set."""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import mido
from mido import Message

from dsmr_mlx.common.errors import UserError

WATCH_INTERVAL = 2.0  # seconds
INSTALL = "pip install 'dsmr-mlx[live]'"


class PortLost(Exception):
    """A port stopped working. The message names the port and the reason."""


class Listener(Protocol):
    """Receives what an endpoint reports, from any thread: `session.Session`."""

    clock: Any

    def receive(self, message: Message) -> None:
        """Handle an incoming message."""
        ...

    def pass_turn(self) -> None:
        """Pass the turn to the other voice."""
        ...

    def finish(self) -> None:
        """Note that an input has ended; the model may still answer."""
        ...

    def stop(self, reason: str) -> None:
        """End the session."""
        ...


class Endpoint(Protocol):
    """Anything that a session starts: an input, an output or both.

    is_input: whether messages or turns may come from it until it calls `finish`.
    """

    is_input: bool

    def start(self, listener: Listener) -> None:
        """Begin to report to the listener: messages, turns, the end."""
        ...


@contextmanager
def midi_system() -> Iterator[None]:
    """Turn errors of the system's MIDI into `UserError`."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"MIDI ports: {error.name or error} cannot be imported, install it with {INSTALL}; "
            "`socket`, `listen` and `in_file` work without it"
        ) from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"MIDI ports: {' '.join(str(error).split())}") from None


def port_names() -> tuple[list[str], list[str]]:
    """Return the names of the inputs and of the outputs. Raises `UserError` if the system has no MIDI."""
    with midi_system():
        return mido.get_input_names(), mido.get_output_names()


def find_port(argument: str, name: str, names: Sequence[str]) -> str:
    """Return the port with a name, or with a part of it in any case. Raises `UserError` if none or several match."""
    if name in names:
        return name
    found = sorted({n for n in names if name.lower() in n.lower()})
    if len(found) == 1:
        return found[0]
    what = f"one of {', '.join(map(repr, found or names)) or 'no ports'}"
    raise UserError(f"`{argument}` {name}: {'several ports match' if found else 'no such port'}, expected {what}")


class DeviceInput:
    """A MIDI input of the computer. Raises `UserError` if it does not exist or cannot be opened."""

    is_input = True

    def __init__(self, in_port: str):
        self.name = find_port("in_port", in_port, port_names()[0])
        self._receive: Callable[[Message], None] = lambda message: None
        with midi_system():
            self._port = mido.open_input(self.name, callback=lambda message: self._receive(message))

    def start(self, listener: Listener) -> None:
        """Pass incoming messages to the listener, and stop it if the device is unplugged."""
        self._receive = listener.receive
        listener.clock.schedule(DeviceWatch(self.name, lambda: port_names()[0], listener.stop))

    def close(self) -> None:
        """Close the port."""
        self._port.close()


class DeviceOutput:
    """A MIDI output of the computer. Raises `UserError` if it does not exist or cannot be opened."""

    is_input = False

    def __init__(self, out_port: str):
        self.name = find_port("out_port", out_port, port_names()[1])
        with midi_system():
            self._port = mido.open_output(self.name)

    def start(self, listener: Listener) -> None:
        """Stop the listener if the device is unplugged."""
        listener.clock.schedule(DeviceWatch(self.name, lambda: port_names()[1], listener.stop))

    def send(self, message: Message) -> None:
        """Send a message. Raises `PortLost`."""
        try:
            self._port.send(message)
        except (OSError, RuntimeError, ValueError) as error:
            raise PortLost(f"{self.name}: {' '.join(str(error).split())}") from error

    def close(self) -> None:
        """Close the port."""
        self._port.close()


class DeviceWatch:
    """A `clock.TimedTask` that checks regularly whether a device is still plugged in; the backend does not tell."""

    def __init__(self, name: str, names: Callable[[], Sequence[str]], stop: Callable[[str], None]):
        self.name, self.names, self.stop = name, names, stop
        self.changed = threading.Condition()
        self._due = 0.0

    def due(self) -> float:
        """See `clock.TimedTask`."""
        return self._due

    def act(self, now: float) -> None:
        """See `clock.TimedTask`."""
        self._due = now + WATCH_INTERVAL
        with contextlib.suppress(UserError):  # a failed listing says nothing about this device
            if self.name not in self.names():
                self._due = math.inf
                self.stop(f"{self.name}: the device was unplugged")
