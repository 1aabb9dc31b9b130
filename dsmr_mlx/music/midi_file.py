"""Read the bytes of a MIDI file into tracks of timed messages (Standard MIDI Files 1.0).

Containers (RMID, MacBinary), other surrounding bytes and chunks of unknown types are skipped. Faults that leave the
music readable are repaired and counted; for others the file is refused with a reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.foreign_files import recognize_foreign_file
from dsmr_mlx.music.midi_track import Track, decode_track
from dsmr_mlx.music.repairs import Repair, Repairs

HEADER, TRACK = b"MThd", b"MTrk"
END_OF_TRACK = b"\xff\x2f\x00"
EVENT = re.compile(rb"[\x80-\xff]{0,3}[\x00-\x7f][\x80-\xff]")  # a delta time and a status byte; never a chunk name
MAX_BEFORE = 1024  # bytes before the header; MacBinary has 128
MAX_TRACKS = 65_535  # the maximum count in a header


@dataclass
class MidiFile:
    """The content of a MIDI file.

    format: 0 to 2; division: the last field of the header, see `Clock`; repairs: faults found while reading.
    """

    format: int
    division: int
    tracks: list[Track] = field(default_factory=list)
    repairs: Repairs = field(default_factory=Repairs)


def read_midi_file(data: bytes, *, blocks: bool = True) -> MidiFile:
    """Decode a MIDI file. blocks: see `decode_track`. Raises `UserError` with the reason if it cannot be read."""
    repairs = Repairs()
    data = _unwrapped(data, repairs)
    length = int.from_bytes(data[4:8])
    if len(data) < 14 or length < 6 or 8 + length > len(data):
        raise UserError(f"not a readable MIDI file (a header of {length:,} bytes in a file of {len(data):,} bytes)")
    kind, counted, division = (int.from_bytes(data[at : at + 2]) for at in (8, 10, 12))
    if kind > 2:
        repairs[Repair.FORMAT] += 1
    file = MidiFile(kind if kind <= 2 else 1, division, repairs=repairs)
    for number, body in enumerate(_track_chunks(data, 8 + length, repairs), start=1):
        if number > MAX_TRACKS:
            raise UserError(f"not a readable MIDI file (more than {MAX_TRACKS:,} tracks)")
        file.tracks.append(decode_track(body, repairs, f"track {number}", blocks=blocks))
    repairs[Repair.TRACK_COUNT] += abs(len(file.tracks) - counted)
    return file


def _unwrapped(data: bytes, repairs: Repairs) -> bytes:
    """Return the bytes from the header on, without their container."""
    if data[:4] == HEADER:
        return data
    if data[:4] == b"RIFF" and data[8:12] == b"RMID":
        inside = _riff_data(data)
        start = inside.find(HEADER)
        if start >= 0:
            return inside[start:]
    start = data[: MAX_BEFORE + len(HEADER) + 3].find(HEADER + b"\0\0\0")
    reason = recognize_foreign_file(data)
    if start < 0 or reason:
        raise UserError(f"not a readable MIDI file ({reason or 'it does not begin with MThd; audio is not MIDI'})")
    repairs[Repair.OUTSIDE] += start
    return data[start:]


def _riff_data(data: bytes) -> bytes:
    """Return the data chunk of a RIFF file; the whole file if its chunk sizes are wrong."""
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data" and 0 < size <= len(data) - at - 8:
            return data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2  # chunks begin at even offsets
    return data


def _track_chunks(data: bytes, at: int, repairs: Repairs) -> Iterator[bytes]:
    """Yield the content of each track chunk, from the offset `at` on."""
    while at < len(data):
        name, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8])
        begin = at + 8
        if name == TRACK:
            # A recorder that is switched off leaves the length at 0.
            if begin + length > len(data) or (not length and EVENT.match(data, begin)):
                length = _length_to_end(data, begin, length)
                repairs[Repair.TRACK_LENGTH] += 1
            yield data[begin : begin + length]
            at = begin + length
        elif len(name) == 4 and all(32 <= byte < 127 for byte in name) and begin + length <= len(data):
            at = begin + length  # a chunk of another type, which readers must skip
        else:
            following = data.find(TRACK, at + 1)
            following = len(data) if following < 0 else following
            repairs[Repair.OUTSIDE] += following - at
            at = following


def _length_to_end(data: bytes, begin: int, length: int) -> int:
    """Return the length, up to End of Track, of a track whose declared length is 0 or beyond the file.

    Raises `UserError` if it has no End of Track, because music may be missing.
    """
    inner = data.find(END_OF_TRACK + TRACK, begin)
    end = inner if inner >= 0 else data.rfind(END_OF_TRACK, begin)
    if end < 0:
        left = max(len(data) - begin, 0)
        found = f"has {length:,} bytes, {left:,} are left" if length or not left else "of length 0 has no End of Track"
        raise UserError(f"not a readable MIDI file (cut off: a track {found})")
    return end + len(END_OF_TRACK) - begin
