"""An output as an instrument: no key is struck that is down, none released that is up, and in the end all are up."""

import threading
from collections.abc import Callable
from enum import StrEnum

from mido import Message


class Voice(StrEnum):
    """The two that take turns."""

    HUMAN = "human"
    MODEL = "model"


SUSTAIN, SOSTENUTO, HOLD_2 = 64, 66, 69  # controllers
ALL_SOUND_OFF, RESET_CONTROLLERS, ALL_NOTES_OFF = 120, 121, 123
PEDAL_IS_UP = (ALL_SOUND_OFF, RESET_CONTROLLERS)  # after these, as after `SUSTAIN` below 64
KEYS_ARE_UP = (ALL_SOUND_OFF, ALL_NOTES_OFF)
SILENCE = (SUSTAIN, SOSTENUTO, HOLD_2, ALL_NOTES_OFF, ALL_SOUND_OFF, RESET_CONTROLLERS)  # with 0: nothing is held


def strikes(message: Message) -> bool:
    """Whether a message presses a key."""
    return message.type == "note_on" and message.velocity > 0


def releases(message: Message) -> bool:
    """Whether a message lets a key go."""
    return message.type == "note_off" or (message.type == "note_on" and message.velocity == 0)


class Instrument:
    """Sends what both voices play, through `send(message)`, which says whether it could; any thread may play.

    A key belongs to the voice that struck it last. Struck while it is down, it is released first; released by the other
    voice, it stays. `sounding`: the keys that are down, (channel, pitch), and whose they are. What could not be
    released is released in the end.
    """

    def __init__(self, send: Callable[[Message], bool]):
        self._send = send
        self._lock = threading.RLock()
        self._channels: set[int] = set()
        self._stuck: set[tuple[int, int]] = set()  # keys whose release could not be sent
        self._closed = False
        self.sounding: dict[tuple[int, int], Voice] = {}

    def play(self, voice: Voice, message: Message) -> bool:
        """Send a message of one of the two, unless it releases a key that is not theirs; whether it was theirs."""
        with self._lock:
            if self._closed:
                return False
            if strikes(message):
                self._strike(voice, message)
            elif releases(message):
                key = message.channel, message.note
                if self.sounding.get(key) is not voice:
                    return False
                self._release(message)
            else:
                if hasattr(message, "channel"):
                    self._channels.add(message.channel)
                self._send(message)
            return True

    def _strike(self, voice: Voice, message: Message) -> None:
        key = message.channel, message.note
        self._channels.add(message.channel)
        if key in self.sounding:
            self._release(note_off(*key))
        self.sounding[key] = voice
        self._send(message)

    def _release(self, message: Message) -> None:
        key = message.channel, message.note
        del self.sounding[key]
        if not self._send(message):
            self._stuck.add(key)

    def release(self, voice: Voice) -> list[Message]:
        """Release all keys of one of the two; the messages that do so."""
        with self._lock:
            sent = [note_off(*key) for key, owner in self.sounding.items() if owner is voice]
            for message in sent:
                self.play(voice, message)
            return sent

    def close(self) -> None:
        """Release each key that is down, then whatever could hold a note on a channel that was used; for good."""
        with self._lock:
            for voice in Voice:
                self.release(voice)
            self._closed = True
            for key in sorted(self._stuck):
                self._send(note_off(*key))
            for channel in sorted(self._channels):
                for control in SILENCE:
                    self._send(Message("control_change", channel=channel, control=control, value=0))
                self._send(Message("pitchwheel", channel=channel, pitch=0))


def note_off(channel: int, pitch: int) -> Message:
    """The message that releases a key."""
    return Message("note_off", channel=channel, note=pitch, velocity=0)
