"""A mido backend with devices that a test plugs in and out, in place of python-rtmidi."""

from mido.ports import BaseInput, BaseOutput

DEVICES: dict[str, str] = {}  # name → "in", "out" or "both"
OPEN: list = []


def get_devices(**options):
    """Return the devices as mido expects them."""
    return [
        {"name": name, "is_input": kind != "out", "is_output": kind != "in"} for name, kind in sorted(DEVICES.items())
    ]


class Input(BaseInput):
    """An input whose `callback` a test calls."""

    def _open(self, callback=None, virtual=False, **options):
        self.callback, self.virtual = callback, virtual
        OPEN.append(self)

    def _close(self):
        OPEN.remove(self)


class Output(BaseOutput):
    """An output that logs what is sent, until its device is unplugged."""

    def _open(self, virtual=False, **options):
        self.sent, self.virtual = [], virtual
        OPEN.append(self)

    def _send(self, message):
        if self.name not in DEVICES and not self.virtual:
            raise OSError("device is gone")
        self.sent.append(message)

    def _close(self):
        OPEN.remove(self)
