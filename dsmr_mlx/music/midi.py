"""Read MIDI files into notes and write notes as MIDI files.

Notes have times in seconds, with the tempo map applied in float64 and the sustain pedal folded in, so other code needs
neither. Reading needs only NumPy: `midi_file` decodes the bytes, `midi_notes` derives the notes. symusic writes the
files; it is imported on first use.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import open_regular, write_atomically
from dsmr_mlx.music.midi_file import MidiFile, read_midi_file
from dsmr_mlx.music.midi_notes import keys_of, songs_of
from dsmr_mlx.music.midi_track import NOTE_ON
from dsmr_mlx.music.notes import DRUMS, Notes, without_overlaps
from dsmr_mlx.music.repairs import Repairs, warn_of_repairs

if TYPE_CHECKING:
    from symusic import Track

READER_VERSION = 3  # incremented when the same file gives other notes
TPQ = 500  # ticks per quarter; at 120 BPM one tick is 1 ms, so the 10 ms grid of the tokens is exact
MAX_DELTA = (1 << 28) - 1  # ticks between two events of a track


@dataclass(frozen=True)
class FileLimits:
    """The maximum size of a MIDI file in bytes, notes and seconds."""

    bytes: int
    notes: int
    seconds: float


READ_LIMITS = FileLimits(256 << 20, 20_000_000, 2e6)  # days of music: any file that this program may have written
CORPUS_LIMITS = FileLimits(64 << 20, 500_000, 4 * 3600.0)  # longer files are hardly pieces of music


class Reading(NamedTuple):
    """The notes of a file, and what was repaired or dropped."""

    notes: Notes
    repairs: Repairs


def read_notes(
    source: bytes | str | os.PathLike,
    *,
    programs: bool = False,
    allow_empty: bool = False,
    limits: FileLimits = READ_LIMITS,
) -> Notes:
    """Read the notes of a MIDI file from its path or its bytes. The first onset is at 0 s.

    programs: False merges all tracks except drums into one instrument; True merges the tracks of each program and keeps
    drums. allow_empty: accept a file without notes.

    The sustain pedal (CC64) is folded into the notes of its channel by Magenta's rule: a note released while the pedal
    is down lasts until the pedal goes up or the pitch is played again. `midi_notes` has the rules for channels that
    several tracks share and for keys without a release. No two notes of one pitch and program overlap in the result.

    Warns with `RepairWarning` about faults that were repaired; `read_midi` returns them instead. Raises `UserError`,
    with the path if one was given, if the file cannot be read, is not a MIDI file, exceeds `limits`, has no pitched
    note or an invalid resolution.
    """
    reading = read_midi(source, programs=programs, allow_empty=allow_empty, limits=limits)
    warn_of_repairs(None if isinstance(source, bytes | bytearray | memoryview) else source, reading.repairs)
    return reading.notes


def read_midi(
    source: bytes | str | os.PathLike,
    *,
    programs: bool = False,
    allow_empty: bool = False,
    limits: FileLimits = READ_LIMITS,
) -> Reading:
    """Read the notes of a MIDI file like `read_notes`, and what was repaired or dropped, without a warning."""
    if isinstance(source, bytes | bytearray | memoryview):
        return _read(read_midi_file(bytes(source)), programs, allow_empty, limits)
    try:
        return _read(read_midi_file(read_bytes(source, limits)), programs, allow_empty, limits)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def read_bytes(path: str | os.PathLike, limits: FileLimits = READ_LIMITS) -> bytes:
    """Read a file. Raises `UserError` (without the path) if it is unreadable or larger than `limits.bytes`."""
    try:
        with open_regular(path) as file:
            data = file.read(limits.bytes + 1)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})") from error
    if len(data) > limits.bytes:
        raise UserError(f"larger than {limits.bytes >> 20} MiB, which is too large for a piece of music")
    return data


def read_text(path: str | os.PathLike) -> str | None:
    """Read the text that `write_notes` stored in a file, its first marker; None without markers.

    Raises `UserError` if it is not a MIDI file.
    """
    try:
        file = read_midi_file(read_bytes(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return next((text.decode(errors="replace") for track in file.tracks for text in track.markers), None)


def midi_bytes(notes: Notes, text: str | None = None) -> bytes:
    """Return the bytes of a standard MIDI file at 120 BPM, 1 tick = 1 ms. They depend on the arguments only.

    It has one piano track, or one track for each program, with drums on channel 10. text: stored as a marker at the
    start, see `read_text`.
    """
    from symusic import Score, Tempo, TextMeta

    score = Score(TPQ)
    score.tempos.append(Tempo(0, 120))
    for program in notes.programs:
        played = notes if notes.program is None else notes.take(notes.program == program)
        name = "piano" if notes.program is None else "drums" if program == DRUMS else f"program {program}"
        score.tracks.append(_to_track(played, name, program))
    if text is not None:
        score.markers.append(TextMeta(0, text))
    return score.dumps_midi()


def _to_track(notes: Notes, name: str, program: int) -> Track:
    """Return the track of one instrument, with ticks of 1 ms."""
    from symusic import Note, TextMeta, Track

    onset = np.rint(notes.onset * 1000).astype(np.int32)
    offset = np.maximum(np.rint(notes.offset * 1000).astype(np.int32), onset + 1)
    track = Track(name, 0 if program == DRUMS else program, program == DRUMS)
    track.notes = Note.from_numpy(
        time=onset,
        duration=offset - onset,
        pitch=notes.pitch.astype(np.int8),
        velocity=np.clip(notes.velocity, 1, 127).astype(np.int8),
    )
    for tick in range(MAX_DELTA, int(offset.max(initial=0)), MAX_DELTA):  # an empty text, to divide longer pauses
        track.lyrics.append(TextMeta(tick, ""))
    return track


def write_notes(notes: Notes, path: str | os.PathLike, *, text: str | None = None) -> None:
    """Write `midi_bytes(notes, text)` to a file atomically. Raises `UserError` if it cannot be written."""
    try:
        write_atomically(path, midi_bytes(notes, text))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def check_strikes(file: MidiFile, limits: FileLimits) -> None:
    """Raise `UserError` if a file has more notes than `limits` allow."""
    strikes = sum(int(((track.kind == NOTE_ON) & (track.second > 0)).sum()) for track in file.tracks)
    if strikes > limits.notes:
        raise UserError(f"{strikes} notes, expected at most {limits.notes}")


def _read(file: MidiFile, programs: bool, allow_empty: bool, limits: FileLimits) -> Reading:
    """Return the notes of all songs of a file as one piece, the first onset at 0."""
    check_strikes(file, limits)
    parts = []
    drums = False
    for song in songs_of(file):
        keys = keys_of(song.messages, file.repairs, programs)
        drums |= keys.is_drum.any()
        chosen = slice(None) if programs else ~keys.is_drum
        program = np.where(keys.is_drum, DRUMS, keys.program)
        times = song.clock.seconds(keys.struck[chosen]), song.clock.seconds(keys.ended[chosen])
        parts.append((*times, keys.pitch[chosen], keys.velocity[chosen], program[chosen]))
    if not sum(len(part[0]) for part in parts):
        if allow_empty:
            return Reading(Notes.empty(), +file.repairs)
        found = "no note" if programs else "no pitched note, only drums" if drums else "no pitched note"
        raise UserError(f"{found}, expected at least one")
    *columns, program = (np.concatenate(column) for column in zip(*parts, strict=True))
    notes = without_overlaps(*columns, program if programs else None).from_first_onset()
    if not notes.duration <= limits.seconds:
        raise UserError(f"{notes.duration:.0f} s long, expected at most {limits.seconds:.0f} s")
    return Reading(notes, +file.repairs)  # without zeros
