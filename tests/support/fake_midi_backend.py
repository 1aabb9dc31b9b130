"""A backend of mido with devices that a test plugs in and out, in place of python-rtmidi."""

from mido.ports import BaseInput, BaseOutput

DEVICES: dict[str, str] = {}  # name → "in", "out" or "both"
OPEN: list = []


def get_devices(**options):
    return [
        {"name": name, "is_input": kind != "out", "is_output": kind != "in"} for name, kind in sorted(DEVICES.items())
    ]


class Input(BaseInput):
    def _open(self, callback=None, **options):
        self.callback = callback
        OPEN.append(self)

    def _close(self):
        OPEN.remove(self)


class Output(BaseOutput):
    def _open(self, **options):
        self.sent = []
        OPEN.append(self)

    def _send(self, message):
        if self.name not in DEVICES:
            raise OSError("device is gone")
        self.sent.append(message)

    def _close(self):
        OPEN.remove(self)
