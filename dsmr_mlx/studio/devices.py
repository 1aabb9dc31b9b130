"""The MIDI input and output that are chosen in the page."""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mido import Message

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.live.instrument import Instrument, Voice
from dsmr_mlx.live.ports import HAS_VIRTUAL, DeviceInput, DeviceOutput, PortLost, VirtualOutput, port_names

VIRTUAL = "virtual"
VIRTUAL_NAME = "dsmr-mlx studio"


class Output:
    """An open MIDI output. Before it is closed it releases all keys and pedals, whoever has pressed them.

    name: of the device, or `VIRTUAL`. failure: why messages cannot be sent any more, None while they can
    """

    def __init__(self, port: DeviceOutput | VirtualOutput):
        self.name = VIRTUAL if isinstance(port, VirtualOutput) else port.name
        self.lost, self.failure = port.lost, None
        self._port, self._instrument = port, Instrument(self._send)

    def send(self, message: Message) -> None:
        """Send a message. Thread-safe; after `close` it does nothing."""
        self._instrument.play(Voice.HUMAN, message)

    def _send(self, message: Message) -> bool:
        try:
            self._port.send(message)
        except PortLost as error:
            self.failure = str(error)
            return False
        return True

    def close(self) -> None:
        """Release everything, and close the port."""
        self._instrument.close()
        self._port.close()


class Devices:
    """The chosen ports, and what comes from the input.

    receive(message): for each message of the input, in the thread of the device. lost(reason): called when a port is
    unplugged or fails
    """

    def __init__(self, receive: Callable[[Message], None], lost: Callable[[str], None]):
        self.receive, self.lost = receive, lost
        self.input: DeviceInput | None = None
        self.output: Output | None = None
        self.problem: str | None = None
        self._lock = threading.Lock()

    def message(self) -> dict[str, Any]:
        """The fields of the message `midi`. Called from the main thread, where the system tells what is plugged in."""
        try:
            inputs, outputs = port_names()
            self.problem = None
        except UserError as error:
            inputs, outputs, self.problem = [], [], problem_of(error)
        return {
            "input": self.input and self.input.name,
            "output": self.output and self.output.name,
            "inputs": [name for name in inputs if VIRTUAL_NAME not in name],
            "outputs": [name for name in outputs if VIRTUAL_NAME not in name],
            "virtual": HAS_VIRTUAL and self.problem is None,
            "problem": self.problem,
        }

    def choose(self, input: str | None, output: str | None) -> None:
        """Open the ports of these names. Raises `UserError` if one cannot be opened; then that one is closed."""
        now = self.message()
        if self.problem is not None and (input or output):
            raise UserError(self.problem)
        if input != now["input"]:
            self._close("input")
            if input is not None:
                self.input = DeviceInput(input)
                self.input.start(self)
        if output != now["output"]:
            self._close("output")
            if output is not None:
                self.output = Output(VirtualOutput(VIRTUAL_NAME) if output == VIRTUAL else DeviceOutput(output))

    def look(self) -> None:
        """Close what was unplugged. Called every few seconds from the main thread, as `message`."""
        for port in (self.input, self.output):
            if port is not None and (reason := port.lost()):
                self.stop(reason)

    def _close(self, which: str) -> None:
        with self._lock:
            port = getattr(self, which)
            setattr(self, which, None)
        if port is not None:
            with suppress(OSError, RuntimeError):  # the device is gone
                port.close()

    def send(self, message: Message) -> bool:
        """Send a message to the output, if there is one. Return whether that worked."""
        output = self.output
        if output is None:
            return True
        output.send(message)
        if output.failure is not None:
            self.stop(output.failure)
        return output.failure is None

    def stop(self, reason: str) -> None:
        """Note that a port is lost."""
        for which in ("input", "output"):
            port = getattr(self, which)
            if port is not None and reason.startswith(f"{port.name}:"):
                self._close(which)
        self.lost(reason)

    def close(self) -> None:
        """Close both ports."""
        self._close("input")
        self._close("output")


def problem_of(error: UserError) -> str:
    """Return why there are no ports; what `live` could do instead is left out."""
    return str(error).partition("; `socket`")[0]
