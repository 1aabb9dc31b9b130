"""Decode MIDI messages from a byte stream, such as a cable or a network connection carries."""

from collections.abc import Iterable, Iterator

from mido import Message

SYSEX, SYSEX_END, REAL_TIME = 0xF0, 0xF7, 0xF8
MAX_SYSEX = 1 << 16  # bytes; longer ones are dropped
# Data bytes after each status byte. Real-time messages have none; statuses that MIDI leaves undefined are absent.
CHANNEL_LENGTHS = {0x80: 2, 0x90: 2, 0xA0: 2, 0xB0: 2, 0xC0: 1, 0xD0: 1, 0xE0: 2}
SYSTEM_LENGTHS = {0xF1: 1, 0xF2: 2, 0xF3: 1, 0xF6: 0}
REAL_TIME_DEFINED = (0xF8, 0xFA, 0xFB, 0xFC, 0xFE, 0xFF)


class Decoder:
    """Incremental decoder (MIDI 1.0, "Running Status" and "System Real Time").

    A status byte applies to all data until the next one. Real-time messages may come inside others. Invalid bytes are
    skipped.
    """

    def __init__(self) -> None:
        self._status: int | None = None
        self._data = bytearray()

    def feed(self, data: Iterable[int]) -> Iterator[Message]:
        """Yield the messages that these bytes complete."""
        for byte in data:
            if byte >= REAL_TIME:
                if byte in REAL_TIME_DEFINED:
                    yield Message.from_bytes([byte])
            elif byte >= 0x80:
                if byte == SYSEX_END and self._status == SYSEX and len(self._data) <= MAX_SYSEX:
                    yield Message("sysex", data=self._data)
                self._status = byte
                self._data.clear()
            elif len(self._data) <= MAX_SYSEX:
                self._data.append(byte)
            if byte < REAL_TIME and len(self._data) == self._length():
                yield Message.from_bytes([self._status, *self._data])
                self._data.clear()
                if self._status > SYSEX:
                    self._status = None

    def _length(self) -> int | None:
        """Return the number of data bytes of the current status; None if it is undefined or a sysex."""
        if self._status is None:
            return None
        return SYSTEM_LENGTHS.get(self._status) if self._status >= SYSEX else CHANNEL_LENGTHS[self._status & 0xF0]
