"""A MIDI file that grows while music is played and is valid at any moment; and the byte format of such files.

`GrowingMidi` needs constant memory: one track at 120 BPM, 1 tick = 1 ms, as in `midi`. To append, the new events are
first written after the end-of-track event, where readers stop; then the track's length is corrected; then one byte
turns the old end-of-track event into an empty text, which makes all that follows part of the track. If the program dies
at any point, the file holds either the old music or the new.
"""

import os
from io import RawIOBase
from pathlib import Path

from dsmr_mlx.common.files import sync, write_atomically
from dsmr_mlx.music.midi import MAX_DELTA, TPQ
from dsmr_mlx.music.midi_clock import DEFAULT_TEMPO

NOTE_OFF, NOTE_ON = 0x80, 0x90
TEMPO = b"\xff\x51\x03" + DEFAULT_TEMPO.to_bytes(3)
PROGRAM = b"\xc0\x00"  # piano
EMPTY_TEXT = b"\xff\x01\x00"
END_OF_TRACK = b"\xff\x2f\x00"
LENGTH_AT, EVENTS_AT = 18, 22  # file offsets of the track's length and of its first event


def variable_length(number: int) -> bytes:
    """Encode a number below 2²⁸ as a MIDI variable-length quantity: seven bits a byte, the highest first."""
    digits = [number & 127]
    while number := number >> 7:
        digits.append(number & 127 | 128)
    return bytes(reversed(digits))


def file_header(kind: int, tracks: int) -> bytes:
    """Return the header chunk of a MIDI file of format `kind` with `TPQ` ticks per quarter."""
    return chunk(b"MThd", b"".join(number.to_bytes(2) for number in (kind, tracks, TPQ)))


def chunk(name: bytes, data: bytes) -> bytes:
    """Return a chunk of a MIDI file: name, length, data."""
    return name + len(data).to_bytes(4) + data


class GrowingMidi:
    """A MIDI file that appears with the first `write` and holds all events up to the last one.

    text: stored as a marker at the start, see `midi.read_text`. Raises `OSError` if the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike, text: str):
        self.path = Path(path)
        encoded = text.encode()
        marker = b"\xff\x06" + variable_length(len(encoded)) + encoded
        self.pending = bytearray(b"".join(b"\0" + event for event in (TEMPO, marker, PROGRAM)))
        self.clock = 0  # ms, time of the last event
        self.end = 0  # file size in bytes, 0 until it exists

    def add(self, milliseconds: int, pitch: int, velocity: int) -> None:
        """Add a note-on, or a note-off (velocity 0), not before the last one. `write` writes it."""
        wait = milliseconds - self.clock
        while wait > MAX_DELTA:
            self.pending += variable_length(MAX_DELTA) + EMPTY_TEXT
            wait -= MAX_DELTA
        self.pending += variable_length(wait) + bytes([NOTE_ON if velocity else NOTE_OFF, pitch, velocity])
        self.clock = milliseconds

    def write(self) -> None:
        """Append the added events to the file."""
        new = bytes(self.pending) + b"\0" + END_OF_TRACK
        if not self.end:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, file_header(0, 1) + chunk(b"MTrk", new))
            self.end = EVENTS_AT + len(new)
        else:
            end = self.end + len(new)
            with self.path.open("r+b", buffering=0) as file:  # not kept open: a process may have only 256 open files
                overwrite(file, self.end, new)
                overwrite(file, LENGTH_AT, (end - EVENTS_AT).to_bytes(4))
                overwrite(file, self.end - len(END_OF_TRACK) + 1, EMPTY_TEXT[1:2])  # the type byte of the meta event
            self.end = end
        self.pending.clear()

    def close(self) -> None:
        """Write the remaining events and flush the file to disk."""
        self.write()
        sync(self.path)


def overwrite(file: RawIOBase, offset: int, data: bytes) -> None:
    """Write all of the data at an offset of a file."""
    file.seek(offset)
    while data:
        data = data[file.write(data) :]
