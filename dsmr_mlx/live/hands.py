"""The human's keys and pedals, and the pitches that sound because of them."""

from typing import NamedTuple

from mido import Message

from dsmr_mlx.live.instrument import is_note_off, is_note_on, note_off, pedal_up
from dsmr_mlx.music.channel_messages import ALL_SOUND_OFF, DRUM_CHANNEL, RELEASES_KEYS, RESET_CONTROLLERS, SUSTAIN

CONTROLLER_ON = 64  # from this value on


class Change(NamedTuple):
    """A pitch that starts to sound at a velocity of 1 to 127, or stops (0)."""

    pitch: int
    velocity: int


def is_music(message: Message) -> bool:
    """Whether the model reads such messages: those of a channel, except the drums'."""
    return getattr(message, "channel", DRUM_CHANNEL) != DRUM_CHANNEL


class Hands:
    """Tracks keys and sustain pedals on all channels except the drums'.

    A key released while the pedal of its channel is down sounds until the pedal goes up or its pitch is pressed again,
    on any channel; controllers that release keys or the pedal act on their channel, as in `midi.read_notes`.
    turn_controller: a controller that passes the turn and therefore is no pedal.
    """

    def __init__(self, turn_controller: int | None = None):
        self.turn_controller = turn_controller
        self.down: set[tuple[int, int]] = set()  # (channel, pitch)
        self._sustained: set[tuple[int, int]] = set()
        self._pedals: dict[int, int] = {}  # how far down the pedal of each channel is, 0 to 127
        self._turn_controller_on: set[int] = set()  # channels

    def update(self, message: Message) -> list[Change]:
        """Apply a message. Return the pitches that start or stop sounding."""
        if not is_music(message):
            return []
        if is_note_on(message):
            self.down.add((message.channel, message.note))
            self._sustained = {key for key in self._sustained if key[1] != message.note}
            return [Change(message.note, message.velocity)]
        if is_note_off(message):
            return self._release({(message.channel, message.note)} & self.down, self._pedals_down())
        if message.type == "control_change":
            return self._control(message)
        return []

    def is_turn_controller(self, message: Message) -> bool:
        """Whether a message belongs to the controller that passes the turn."""
        return is_music(message) and message.type == "control_change" and message.control == self.turn_controller

    def passes_turn(self, message: Message) -> bool:
        """Apply a message. Return whether it switches on the controller that passes the turn."""
        if not self.is_turn_controller(message):
            return False
        before = message.channel in self._turn_controller_on
        if message.value >= CONTROLLER_ON:
            self._turn_controller_on.add(message.channel)
            return not before
        self._turn_controller_on.discard(message.channel)
        return False

    @property
    def pedal(self) -> tuple[bool, bool]:
        """Whether the pedal of a channel is down, and whether one holds a key that is up."""
        return bool(self._pedals_down()), bool(self._sustained)

    def release_messages(self) -> list[Message]:
        """Return the messages that release all keys and pedals."""
        moved = sorted(channel for channel, value in self._pedals.items() if value)
        return [note_off(*key) for key in sorted(self.down)] + [pedal_up(channel) for channel in moved]

    def _pedals_down(self) -> set[int]:
        return {channel for channel, value in self._pedals.items() if value >= CONTROLLER_ON}

    def _control(self, message: Message) -> list[Change]:
        channel, up = message.channel, set()
        is_pedal = message.control == SUSTAIN and self.turn_controller != SUSTAIN
        if is_pedal or message.control == RESET_CONTROLLERS:
            self._pedals[channel] = message.value if is_pedal else 0
            if self._pedals[channel] < CONTROLLER_ON:
                up |= {key for key in self._sustained if key[0] == channel}
        if message.control in RELEASES_KEYS:
            up |= {key for key in self.down if key[0] == channel}
        if message.control == ALL_SOUND_OFF:  # also what the pedal holds, though it stays down
            return self._release(up | {key for key in self._sustained if key[0] == channel}, pedals=set())
        return self._release(up, self._pedals_down())

    def _release(self, keys: set[tuple[int, int]], pedals: set[int]) -> list[Change]:
        """Release keys. A pitch stops unless the pedal of a channel in `pedals` or another channel holds it."""
        held_by_pedal = {key for key in keys & self.down if key[0] in pedals}
        self.down -= keys
        self._sustained = (self._sustained - keys) | held_by_pedal
        sounding = {pitch for _, pitch in self.down | self._sustained}
        return [Change(pitch, 0) for pitch in sorted({pitch for _, pitch in keys} - sounding)]
