"""An output as an instrument: no key is struck that is down, none released that is up, and in the end all are up."""

import threading
from collections.abc import Callable

from mido import Message

from dsmr_mlx.live.voice import Voice

SUSTAIN, ALL_NOTES_OFF = 64, 123  # controllers


def strikes(message: Message) -> bool:
    """Whether a message presses a key."""
    return message.type == "note_on" and message.velocity > 0


def releases(message: Message) -> bool:
    """Whether a message lets a key go."""
    return message.type == "note_off" or (message.type == "note_on" and message.velocity == 0)


class Instrument:
    """Sends what both voices play, through `send(message)`; any thread may play.

    A key belongs to the voice that struck it last. Struck while it is down, it is released first; released by the other
    voice, it stays. `sounding`: the keys that are down, (channel, pitch), and whose they are.
    """

    def __init__(self, send: Callable[[Message], None]):
        self._send = send
        self._lock = threading.RLock()
        self._channels: set[int] = set()
        self._closed = False
        self.sounding: dict[tuple[int, int], Voice] = {}

    def play(self, voice: Voice, message: Message) -> bool:
        """Send a message of one of the two, unless it releases a key that is not theirs; whether it was sent."""
        with self._lock:
            if self._closed:
                return False
            if strikes(message):
                self._strike(voice, message)
            elif releases(message):
                key = message.channel, message.note
                if self.sounding.get(key) is not voice:
                    return False
                del self.sounding[key]
                self._send(message)
            else:
                if hasattr(message, "channel"):
                    self._channels.add(message.channel)
                self._send(message)
            return True

    def _strike(self, voice: Voice, message: Message) -> None:
        key = message.channel, message.note
        self._channels.add(message.channel)
        if self.sounding.pop(key, None) is not None:
            self._send(note_off(*key))
        self.sounding[key] = voice
        self._send(message)

    def release(self, voice: Voice) -> list[Message]:
        """Release all keys of one of the two, and return what was sent."""
        with self._lock:
            sent = [note_off(*key) for key, owner in self.sounding.items() if owner is voice]
            for message in sent:
                self.play(voice, message)
            return sent

    def close(self) -> None:
        """Release each key that is down, then the pedal and, once more, all keys of each channel used; for good."""
        with self._lock:
            for voice in Voice:
                self.release(voice)
            self._closed = True
            for channel in sorted(self._channels):
                for control in (SUSTAIN, ALL_NOTES_OFF):
                    self._send(Message("control_change", channel=channel, control=control, value=0))


def note_off(channel: int, pitch: int) -> Message:
    """The message that releases a key."""
    return Message("note_off", channel=channel, note=pitch, velocity=0)
