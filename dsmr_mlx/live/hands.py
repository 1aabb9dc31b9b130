"""What the human's hands and feet do, and which strings sound because of it."""

from typing import NamedTuple

from mido import Message

from dsmr_mlx.live.instrument import KEYS_ARE_UP, PEDAL_IS_UP, SUSTAIN, note_off, releases, strikes

DRUMS = 9  # the channel of General MIDI's drums, counted from 0
HALF = 64  # a controller is on from here


class Change(NamedTuple):
    """A pitch that begins to sound at a velocity of 1 to 127, or with 0 ceases to."""

    pitch: int
    velocity: int


def is_music(message: Message) -> bool:
    """Whether the model is to hear a message at all: not the clock, and not the drums."""
    return getattr(message, "channel", DRUMS) != DRUMS


class Hands:
    """Follows keys and sustain pedal on all channels but the drums'.

    A key that goes up while the pedal of its channel is down sounds until the pedal goes up, or until it is struck
    again: what `midi.read_notes` does to files. `signal`: a controller that passes the turn; it is no pedal then.
    """

    def __init__(self, signal: int | None = None):
        self.signal = signal
        self.down: set[tuple[int, int]] = set()  # (channel, pitch)
        self._sustained: set[tuple[int, int]] = set()
        self._pedals: set[int] = set()  # channels
        self._signalling: set[int] = set()

    def take(self, message: Message) -> list[Change]:
        """What begins or ceases to sound."""
        if not is_music(message):
            return []
        if strikes(message):
            self.down.add((message.channel, message.note))
            self._sustained.discard((message.channel, message.note))
            return [Change(message.note, message.velocity)]
        if releases(message):
            return self._lift({(message.channel, message.note)} & self.down)
        if message.type == "control_change":
            return self._control(message)
        return []

    def is_signal(self, message: Message) -> bool:
        """Whether a message is of the controller that passes the turn."""
        return is_music(message) and message.type == "control_change" and message.control == self.signal

    def signals(self, message: Message) -> bool:
        """Whether the controller that passes the turn goes on with this message."""
        if not self.is_signal(message):
            return False
        before = message.channel in self._signalling
        if message.value >= HALF:
            self._signalling.add(message.channel)
            return not before
        self._signalling.discard(message.channel)
        return False

    def lifting(self) -> list[Message]:
        """What they send to let go of everything, but for the signal."""
        keys = [note_off(*key) for key in sorted(self.down)]
        return keys + [
            Message("control_change", channel=channel, control=SUSTAIN, value=0) for channel in sorted(self._pedals)
        ]

    def _control(self, message: Message) -> list[Change]:
        channel, up = message.channel, set()
        is_pedal = message.control == SUSTAIN and self.signal != SUSTAIN
        if is_pedal and message.value >= HALF:
            self._pedals.add(channel)
        elif is_pedal or message.control in PEDAL_IS_UP:
            self._pedals.discard(channel)
            up |= {key for key in self._sustained if key[0] == channel}
        if message.control in KEYS_ARE_UP:
            up |= {key for key in self.down if key[0] == channel}
        return self._lift(up)

    def _lift(self, keys: set[tuple[int, int]]) -> list[Change]:
        """Keys that go up: those pitches cease to sound that no pedal and no other channel holds."""
        held_by_pedal = {key for key in keys & self.down if key[0] in self._pedals}
        self.down -= keys
        self._sustained = (self._sustained - keys) | held_by_pedal
        sounding = {pitch for _, pitch in self.down | self._sustained}
        return [Change(pitch, 0) for pitch in sorted({pitch for _, pitch in keys} - sounding)]
