"""The output of a session: it tracks pressed keys and releases them all on close."""

import threading
from collections.abc import Callable
from enum import StrEnum

from mido import Message

from dsmr_mlx.music.channel_messages import ALL_NOTES_OFF, ALL_SOUND_OFF, RESET_CONTROLLERS, SUSTAIN


class Voice(StrEnum):
    """The two players who take turns."""

    HUMAN = "human"
    MODEL = "model"


SOSTENUTO, HOLD_2 = 66, 69  # controllers
PANIC = (SUSTAIN, SOSTENUTO, HOLD_2, ALL_NOTES_OFF, ALL_SOUND_OFF, RESET_CONTROLLERS)  # at 0 nothing is held


def is_note_on(message: Message) -> bool:
    """Whether a message presses a key."""
    return message.type == "note_on" and message.velocity > 0


def is_note_off(message: Message) -> bool:
    """Whether a message releases a key."""
    return message.type == "note_off" or (message.type == "note_on" and message.velocity == 0)


def note_off(channel: int, pitch: int) -> Message:
    """Return the message that releases a key."""
    return Message("note_off", channel=channel, note=pitch, velocity=0)


def pedal_up(channel: int) -> Message:
    """Return the message that releases the sustain pedal."""
    return Message("control_change", channel=channel, control=SUSTAIN, value=0)


class Instrument:
    """Sends the messages of both voices through `send(message)`, which returns whether it could. Thread-safe.

    A key belongs to the voice that pressed it last. If it is down already, it is released before it is pressed again;
    the other voice cannot release it. A note-off that could not be sent is sent again by `close`. pressed: the voice of
    each key (channel, pitch) that is down.
    """

    def __init__(self, send: Callable[[Message], bool]):
        self._send = send
        self._lock = threading.RLock()
        self._channels: set[int] = set()
        self._stuck: set[tuple[int, int]] = set()  # keys whose note-off could not be sent
        self._closed = False
        self.pressed: dict[tuple[int, int], Voice] = {}

    def play(self, voice: Voice, message: Message) -> bool:
        """Send a message unless it releases a key that the voice does not hold. Return whether it applied."""
        with self._lock:
            if self._closed:
                return False
            if is_note_on(message):
                self._press(voice, message)
            elif is_note_off(message):
                if self.pressed.get((message.channel, message.note)) is not voice:
                    return False
                self._release(message)
            else:
                if hasattr(message, "channel"):
                    self._channels.add(message.channel)
                self._send(message)
            return True

    def _press(self, voice: Voice, message: Message) -> None:
        key = message.channel, message.note
        self._channels.add(message.channel)
        if key in self.pressed:
            self._release(note_off(*key))
        self.pressed[key] = voice
        self._send(message)

    def _release(self, message: Message) -> None:
        key = message.channel, message.note
        del self.pressed[key]
        if not self._send(message):
            self._stuck.add(key)

    def release(self, voice: Voice) -> list[Message]:
        """Release all keys of a voice. Return the messages sent."""
        with self._lock:
            sent = [note_off(*key) for key, owner in self.pressed.items() if owner is voice]
            for message in sent:
                self.play(voice, message)
            return sent

    def close(self) -> None:
        """Do what `silence` does, and send nothing after that."""
        with self._lock:
            self.silence()
            self._closed = True

    def silence(self) -> None:
        """Release every key and reset the controllers of all channels that were used."""
        with self._lock:
            for voice in Voice:
                self.release(voice)
            for key in sorted(self._stuck):
                self._send(note_off(*key))
            for channel in sorted(self._channels):
                for control in PANIC:
                    self._send(Message("control_change", channel=channel, control=control, value=0))
                self._send(Message("pitchwheel", channel=channel, pitch=0))
