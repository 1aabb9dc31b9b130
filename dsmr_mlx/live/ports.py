"""The computer's MIDI devices, through mido and its backend, python-rtmidi unless another is set."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import mido
from mido import Message

from dsmr_mlx.common.errors import UserError

HAS_VIRTUAL = sys.platform != "win32"
INSTALL = "pip install 'dsmr-mlx[live]'"
REPAIR = "install it again with pip install --force-reinstall --no-cache-dir python-rtmidi"


class BrokenBackend(UserError):
    """Raised if the MIDI backend is installed but cannot be imported, as one for another processor."""


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

    # Devices also have `lost() -> str | None`, which returns why one is gone. It is called every few seconds in the
    # thread that has opened it: macOS reports changes of devices only to that thread.


@contextmanager
def midi_system() -> Iterator[None]:
    """Turn errors of the system's MIDI into `UserError`."""
    without = "`socket`, `listen` and `in_file` work without it"
    try:
        yield
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and "." not in (error.name or "."):
            raise UserError(
                f"MIDI ports: {error.name} cannot be imported, install it with {INSTALL}; {without}"
            ) from None
        reason = " ".join(str(error).split())
        raise BrokenBackend(f"MIDI ports: {error.name} cannot be imported ({reason}), {REPAIR}; {without}") from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"MIDI ports: {' '.join(str(error).split())}; {without}") from None


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
    problem = "several ports match" if found else "no such port"
    known = f"expected one of {', '.join(map(repr, found or names))}" if names else "this computer has none"
    raise UserError(f"`{argument}` {name}: {problem}, {known}")


class DeviceInput:
    """A MIDI input of the computer. Raises `UserError` if it does not exist or cannot be opened."""

    is_input = True

    def __init__(self, in_port: str):
        self.name = find_port("in_port", in_port, port_names()[0])
        self._open(self.name)

    def _open(self, name: str, **options: bool) -> None:
        self._receive: Callable[[Message], None] = lambda message: None
        with midi_system():
            self._port = mido.open_input(name, callback=lambda message: self._receive(message), **options)

    def start(self, listener: Listener) -> None:
        """Pass incoming messages to the listener."""
        self._receive = listener.receive

    def lost(self) -> str | None:
        """See `Endpoint`."""
        return unplugged(self.name, 0)

    def close(self) -> None:
        """Close the port."""
        self._port.close()


class DeviceOutput:
    """A MIDI output of the computer. Raises `UserError` if it does not exist or cannot be opened."""

    is_input = False

    def __init__(self, out_port: str):
        self.name = find_port("out_port", out_port, port_names()[1])
        self._open(self.name)

    def _open(self, name: str, **options: bool) -> None:
        with midi_system():
            self._port = mido.open_output(name, **options)

    def start(self, listener: Listener) -> None:
        """See `Endpoint`; nothing comes from an output."""

    def lost(self) -> str | None:
        """See `Endpoint`."""
        return unplugged(self.name, 1)

    def send(self, message: Message) -> None:
        """Send a message. Raises `PortLost`."""
        try:
            self._port.send(message)
        except (OSError, RuntimeError, ValueError) as error:
            raise PortLost(f"{self.name}: {' '.join(str(error).split())}") from error

    def close(self) -> None:
        """Close the port."""
        self._port.close()


class Virtual:
    """Makes a port virtual: other programs of this computer, such as a DAW, see its other end.

    Raises `UserError` if the system has no such ports.
    """

    def __init__(self, name: str):
        if not HAS_VIRTUAL:
            raise UserError("`virtual`: Windows has no virtual MIDI ports, expected the name of a port")
        self.name = name
        self._open(name, virtual=True)

    def lost(self) -> None:
        """Return None: a virtual port cannot be unplugged."""


class VirtualInput(Virtual, DeviceInput):
    """A MIDI input that other programs see as an output."""


class VirtualOutput(Virtual, DeviceOutput):
    """A MIDI output that other programs see as an input."""


def unplugged(name: str, kind: int) -> str | None:
    """Return a message if a device was unplugged, else None; kind: 0 an input, 1 an output.

    If the devices cannot be listed, it counts as present.
    """
    try:
        found = name in port_names()[kind]
    except UserError:
        return None
    return None if found else f"{name}: the device was unplugged"
