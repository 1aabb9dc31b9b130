"""The MIDI input and output that are chosen in the page."""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mido import Message

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.live.ports import HAS_VIRTUAL, DeviceInput, DeviceOutput, PortLost, VirtualOutput, port_names

VIRTUAL = "virtual"
VIRTUAL_NAME = "dsmr-mlx studio"


class Devices:
    """The chosen ports, and what comes from the input.

    receive(message): for each message of the input, in the thread of the device. lost(reason): called when a port is
    unplugged or fails
    """

    def __init__(self, receive: Callable[[Message], None], lost: Callable[[str], None]):
        self.receive, self.lost = receive, lost
        self.input: DeviceInput | None = None
        self.output: DeviceOutput | VirtualOutput | None = None
        self.problem: str | None = None
        self._lock = threading.Lock()

    def message(self) -> dict[str, Any]:
        """The fields of the message `midi`. Called from the main thread, where the system tells what is plugged in."""
        try:
            inputs, outputs = port_names()
            self.problem = None
        except UserError as error:
            inputs, outputs, self.problem = [], [], problem_of(error)
        chosen = VIRTUAL if isinstance(self.output, VirtualOutput) else self.output and self.output.name
        return {
            "input": self.input and self.input.name,
            "output": chosen,
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
                self.output = VirtualOutput(VIRTUAL_NAME) if output == VIRTUAL else DeviceOutput(output)

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
        try:
            output.send(message)
        except PortLost as error:
            self.stop(str(error))
            return False
        return True

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
