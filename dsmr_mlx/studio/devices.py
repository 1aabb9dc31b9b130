"""The MIDI input and output that are chosen in the page."""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mido import Message

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.live.instrument import Instrument, Voice
from dsmr_mlx.live.ports import HAS_VIRTUAL, DeviceInput, DeviceOutput, PortLost, VirtualOutput, port_names
from dsmr_mlx.studio.performer import Performer

VIRTUAL = "virtual"
VIRTUAL_NAME = "dsmr-mlx studio"


class Input:
    """An open MIDI input. When it is closed, all keys and pedals that are down are released.

    receive(message): for each message, in the thread of the device
    """

    def __init__(self, port: DeviceInput, receive: Callable[[Message], None]):
        self.name, self.lost = port.name, port.lost
        self._port, self._performer = port, Performer(receive)
        port.start(self._performer)

    def close(self) -> None:
        """Close the port, and release everything."""
        try:
            self._port.close()
        finally:
            self._performer.leave()


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

    receive(message): for each message of the input, in the thread of the device. changed(): called if `message` has
    changed, but not by `choose`. lost(reason): called if a port was unplugged or has failed.

    Made, and used by `choose` and `look`, in the main thread: macOS reports changes of devices only to that thread.
    """

    def __init__(self, receive: Callable[[Message], None], lost: Callable[[str], None], changed: Callable[[], None]):
        self.receive, self.lost, self.changed = receive, lost, changed
        self.input: Input | None = None
        self.output: Output | None = None
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.problem: str | None = None
        self._listed = False  # whether the system has MIDI
        self._lock = threading.Lock()
        self._list()

    def _list(self) -> None:
        """Find the ports that can be chosen, or why there are none. If that fails later, the last ones stay."""
        try:
            inputs, outputs = port_names()
        except UserError as error:
            if not self._listed:
                self.problem = problem_of(error)
            return
        self._listed, self.problem = True, None
        self.inputs = [name for name in inputs if VIRTUAL_NAME not in name]
        self.outputs = [name for name in outputs if VIRTUAL_NAME not in name]

    def message(self) -> dict[str, Any]:
        """The fields of the message `midi`, as they were when the ports were listed last. Thread-safe."""
        input, output = self.input, self.output
        return {
            "input": input and input.name,
            "output": output and output.name,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "virtual": HAS_VIRTUAL and self.problem is None,
            "problem": self.problem,
        }

    def choose(self, input: str | None, output: str | None) -> None:
        """Open the ports of these names. Raises `UserError` if one cannot be opened; then that one is closed."""
        self._list()
        if self.problem is not None and (input or output):
            raise UserError(self.problem)
        now = self.message()
        if input != now["input"]:
            self._close("input")
            if input is not None:
                self.input = Input(DeviceInput(input), self.receive)
        if output != now["output"]:
            self._close("output")
            if output is not None:
                self.output = Output(VirtualOutput(VIRTUAL_NAME) if output == VIRTUAL else DeviceOutput(output))

    def look(self, retry: bool = False) -> None:
        """Close what was unplugged, and tell of changes. Called every few seconds.

        retry: list the ports even if the system had no MIDI so far; each such attempt may print errors
        """
        before = self.message()
        if self._listed or retry:
            self._list()
        reasons = set()
        for which in ("input", "output"):
            port = getattr(self, which)
            if port is not None and (reason := port.lost()):
                self._close(which)
                reasons.add(reason)
        if self.message() != before:
            self.changed()
        for reason in sorted(reasons):
            self.lost(reason)

    def _close(self, which: str) -> bool:
        """Close a port. Return whether it was open."""
        with self._lock:
            port = getattr(self, which)
            setattr(self, which, None)
        if port is not None:
            with suppress(OSError, RuntimeError):  # the device is gone
                port.close()
        return port is not None

    def send(self, message: Message) -> bool:
        """Send a message to the output, if there is one. Return whether that worked. Thread-safe."""
        output = self.output
        if output is None:
            return True
        output.send(message)
        if output.failure is not None and self.output is output and self._close("output"):
            self.changed()
            self.lost(output.failure)
        return output.failure is None

    def close(self) -> None:
        """Close both ports."""
        self._close("input")
        self._close("output")


def problem_of(error: UserError) -> str:
    """Return why there are no ports; what `live` could do instead is left out."""
    return str(error).partition("; `socket`")[0]
