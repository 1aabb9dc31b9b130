"""A MIDI file that is whole at any moment while notes are added to it."""

import os
from pathlib import Path

from dsmr_mlx.common.files import write_atomically
from dsmr_mlx.music.midi import TPQ

NOTE_OFF, NOTE_ON = 0x80, 0x90
TEMPO = b"\xff\x51\x03" + (500_000).to_bytes(3, "big")  # microseconds per quarter
PROGRAM = b"\xc0\x00"  # a piano
EMPTY_TEXT = b"\xff\x01\x00"
END_OF_TRACK = b"\xff\x2f\x00"
LENGTH_AT, EVENTS_AT = 18, 22  # in the file
LONGEST_WAIT = (1 << 28) - 1  # ticks that a MIDI file can wait for an event


def variable_length(number: int) -> bytes:
    """A number below 2²⁸ as MIDI files have them, seven bits a byte."""
    digits = [number & 127]
    while number := number >> 7:
        digits.append(number & 127 | 128)
    return bytes(reversed(digits))


class GrowingMidi:
    """A MIDI file that appears with its first `write` and has all events up to the last one.

    text is stored as a marker at the start, see `midi.read_text`. Raises `OSError` where the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike, text: str):
        self.path = Path(path)
        encoded = text.encode()
        marker = b"\xff\x06" + variable_length(len(encoded)) + encoded
        self.pending = bytearray(b"".join(b"\0" + event for event in (TEMPO, marker, PROGRAM)))
        self.clock = 0  # ms, of the last event
        self.end = 0  # bytes of the file, 0 until it is there
        self.file = None

    def add(self, milliseconds: int, pitch: int, velocity: int) -> None:
        """A key goes down, or with velocity 0 up; not before the last one that did. It is written later."""
        wait = milliseconds - self.clock
        while wait > LONGEST_WAIT:
            self.pending += variable_length(LONGEST_WAIT) + EMPTY_TEXT
            wait -= LONGEST_WAIT
        self.pending += variable_length(wait) + bytes([NOTE_ON if velocity else NOTE_OFF, pitch, velocity])
        self.clock = milliseconds

    def write(self) -> None:
        """Bring what has been added into the file."""
        new = bytes(self.pending) + b"\0" + END_OF_TRACK
        if self.file is None:
            header = b"MThd" + b"".join(n.to_bytes(size, "big") for n, size in ((6, 4), (0, 2), (1, 2), (TPQ, 2)))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, header + b"MTrk" + len(new).to_bytes(4, "big") + new)
            self.end = EVENTS_AT + len(new)
            self.file = self.path.open("r+b", buffering=0)
        else:
            end = self.end + len(new)
            self._put(self.end, new)
            self._put(LENGTH_AT, (end - EVENTS_AT).to_bytes(4, "big"))
            self._put(self.end - len(END_OF_TRACK) + 1, EMPTY_TEXT[1:2])
            self.end = end
        self.pending.clear()

    def close(self) -> None:
        """Write what is left and flush it to disk."""
        self.write()
        os.fsync(self.file.fileno())
        self.file.close()

    def _put(self, place: int, data: bytes) -> None:
        self.file.seek(place)
        while data:
            data = data[self.file.write(data) :]
