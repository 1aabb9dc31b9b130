"""MIDI as a stream of bytes, such as a cable or a connection carries."""

from collections.abc import Iterable, Iterator

from mido import Message

SYSEX, SYSEX_END, REAL_TIME = 0xF0, 0xF7, 0xF8
LONGEST_SYSEX = 1 << 16  # bytes; a longer one is left out
# How many data bytes follow a status. Without those of real time, and those that MIDI leaves undefined.
CHANNEL_LENGTHS = {0x80: 2, 0x90: 2, 0xA0: 2, 0xB0: 2, 0xC0: 1, 0xD0: 1, 0xE0: 2}
SYSTEM_LENGTHS = {0xF1: 1, 0xF2: 2, 0xF3: 1, 0xF6: 0}
REAL_TIME_DEFINED = (0xF8, 0xFA, 0xFB, 0xFC, 0xFE, 0xFF)


class Decoder:
    """Turns bytes into messages, in whatever pieces they come (MIDI 1.0, "Running Status" and "System Real Time").

    A status holds for all data after it until the next one; messages of real time may come in the middle of others.
    What cannot be understood is left out.
    """

    def __init__(self) -> None:
        self._status: int | None = None
        self._data = bytearray()

    def feed(self, data: Iterable[int]) -> Iterator[Message]:
        """The messages that are complete with some more bytes."""
        for byte in data:
            if byte >= REAL_TIME:
                if byte in REAL_TIME_DEFINED:
                    yield Message.from_bytes([byte])
            elif byte >= 0x80:
                if byte == SYSEX_END and self._status == SYSEX and len(self._data) <= LONGEST_SYSEX:
                    yield Message("sysex", data=self._data)
                self._status = byte
                self._data.clear()
            elif len(self._data) <= LONGEST_SYSEX:
                self._data.append(byte)
            if byte < REAL_TIME and len(self._data) == self._length():
                yield Message.from_bytes([self._status, *self._data])
                self._data.clear()
                if self._status > SYSEX:
                    self._status = None

    def _length(self) -> int | None:
        """How many data bytes make a message of the current status; None: there is none, or they have an end."""
        if self._status is None:
            return None
        return SYSTEM_LENGTHS.get(self._status) if self._status >= SYSEX else CHANNEL_LENGTHS[self._status & 0xF0]
