"""Read MIDI files into notes and write notes as MIDI files.

Notes have times in seconds. The tempo map is applied in float64 (symusic's own `to("second")` is float32) and the
sustain pedal is folded into the notes, so other code needs neither. symusic parses and writes the files. It is imported
on first use, because training on a prepared corpus needs no MIDI library.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import write_atomically
from dsmr_mlx.music.notes import DRUMS, Notes, without_overlaps

if TYPE_CHECKING:
    from symusic import Score, Track

SUSTAIN = 64  # the controller; from a value of 64 on the pedal is down
DEFAULT_TEMPO = 500_000  # microseconds per quarter before the first tempo event: 120 BPM
TPQ = 500  # ticks per quarter; at 120 BPM one tick is 1 ms, so the 10 ms grid of the tokens is exact


@dataclass(frozen=True)
class FileLimits:
    """The maximum size of a MIDI file in bytes, notes and seconds."""

    bytes: int
    notes: int
    seconds: float


READ_LIMITS = FileLimits(256 << 20, 20_000_000, 2e6)  # days of music: anything this program may have written
CORPUS_LIMITS = FileLimits(64 << 20, 500_000, 4 * 3600.0)  # longer files are hardly pieces of music


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

    The sustain pedal (CC64) of a track, or of the other tracks of its program if it has no pedal events, is folded into
    its notes by Magenta's rule: a note released while the pedal is down lasts until the pedal goes up or the pitch is
    played again. No two notes of one pitch and program overlap in the result. Notes that never end are ignored, and so
    are pedal events in a track without notes (symusic drops such tracks).

    Raises `UserError`, with the path if one was given, if the file cannot be read, is not a MIDI file, exceeds
    `limits`, has no pitched note, a tempo or resolution of 0, or overflowing time stamps.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return _notes(_score(bytes(source)), programs, allow_empty, limits)
    try:
        return _notes(_score(read_bytes(source, limits)), programs, allow_empty, limits)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def read_bytes(path: str | os.PathLike, limits: FileLimits = READ_LIMITS) -> bytes:
    """Read a file. Raises `UserError` (without the path) if it is unreadable or larger than `limits.bytes`."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(limits.bytes + 1)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})") from error
    if len(data) > limits.bytes:
        raise UserError(f"larger than {limits.bytes >> 20} MiB, which is too large for a piece of music")
    return data


def read_text(path: str | os.PathLike) -> str | None:
    """Read the text that `write_notes` stored in a file, its first marker; None if there is none.

    Raises `UserError` if it is not a MIDI file.
    """
    try:
        markers = _score(read_bytes(path)).markers
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return markers[0].text if len(markers) else None


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
    from symusic import Note, Track

    onset = np.rint(notes.onset * 1000).astype(np.int32)
    offset = np.maximum(np.rint(notes.offset * 1000).astype(np.int32), onset + 1)
    track = Track(name, 0 if program == DRUMS else program, program == DRUMS)
    track.notes = Note.from_numpy(
        time=onset,
        duration=offset - onset,
        pitch=notes.pitch.astype(np.int8),
        velocity=np.clip(notes.velocity, 1, 127).astype(np.int8),
    )
    return track


def write_notes(notes: Notes, path: str | os.PathLike, *, text: str | None = None) -> None:
    """Write `midi_bytes(notes, text)` to a file atomically. Raises `UserError` if it cannot be written."""
    try:
        write_atomically(path, midi_bytes(notes, text))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def _score(data: bytes) -> Score:
    """Parse a MIDI file, which may be wrapped in RIFF (RMID)."""
    from symusic import Score

    if data[:4] == b"RIFF":
        data = data[max(data.find(b"MThd"), 0) :]
    if data[:4] != b"MThd":
        found = "it does not begin with MThd; audio is not MIDI" if data else "it is empty"
        raise UserError(f"not a readable MIDI file ({found})")
    try:
        return Score.from_midi(data)
    except Exception as error:  # symusic does not document its exceptions
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"not a readable MIDI file ({reason})") from error


def _notes(score: Score, programs: bool, allow_empty: bool, limits: FileLimits) -> Notes:
    """Merge the tracks of a score, all or by program, in seconds, with the pedal folded in; first onset at 0."""
    if score.note_num() > limits.notes:
        raise UserError(f"{score.note_num()} notes, expected at most {limits.notes}")
    tracks = [track for track in score.tracks if len(track.notes) and (programs or not track.is_drum)]
    if not tracks and allow_empty:
        return Notes.empty()
    if not tracks:
        raise UserError(f"no {'' if programs else 'pitched '}note, expected at least one")
    clock = TempoMap.of(score)
    pedals = {id(track): _pedal_events(track) for track in tracks}
    parts = []
    for track in tracks:
        # Often each hand of a piano has a track, and only one of them has the pedal.
        hands = [track] if len(pedals[id(track)]) else [t for t in tracks if _program(t) == _program(track)]
        onset, offset, pitch, velocity = _track_notes(track, np.concatenate([pedals[id(h)] for h in hands]), clock)
        parts.append((onset, offset, pitch, velocity, np.full(len(onset), _program(track))))
    *columns, program = (np.concatenate(column) for column in zip(*parts, strict=True))
    notes = without_overlaps(*columns, program if programs else None).from_first_onset()
    if not notes.duration <= limits.seconds:
        raise UserError(f"{notes.duration:.0f} s long, expected at most {limits.seconds:.0f} s")
    return notes


def _program(track: Track) -> int:
    return DRUMS if track.is_drum else track.program


@dataclass(frozen=True)
class TempoMap:
    """Conversion of ticks to seconds in float64, piecewise linear between tempo events.

    tick: `(K,)` int64, start of each tempo, the first at 0; tempo: `(K,)` float64, microseconds per quarter; elapsed:
    `(K,)` float64, microseconds × tpq at these ticks.
    """

    tick: np.ndarray
    tempo: np.ndarray
    elapsed: np.ndarray
    tpq: int

    @classmethod
    def of(cls, score: Score) -> TempoMap:
        """Return the tempo map of a score. Raises `UserError` if a tempo or the resolution is not positive."""
        if score.tpq <= 0:
            raise UserError(f"resolution of {score.tpq} ticks per quarter, expected at least 1")
        events = score.tempos.numpy()
        tick, tempo = events["time"].astype(np.int64), events["mspq"].astype(np.float64)
        if len(tempo) and tempo.min() <= 0:
            raise UserError(f"tempo of {tempo.min():.0f} µs per quarter, expected more than 0")
        _check_ticks(tick)
        if not len(tick) or tick[0] > 0:
            tick, tempo = np.append(0, tick), np.append(DEFAULT_TEMPO, tempo)
        return cls(tick, tempo, np.append(0.0, np.cumsum(np.diff(tick) * tempo[:-1])), score.tpq)

    def seconds(self, ticks: np.ndarray) -> np.ndarray:
        """Convert ticks `(N,)` to seconds `(N,)` float64. Of several tempi at one tick the last counts."""
        i = np.searchsorted(self.tick, ticks, side="right") - 1  # the tempo at each tick
        return (self.elapsed[i] + (ticks - self.tick[i]) * self.tempo[i]) / (1e6 * self.tpq)


def _track_notes(track: Track, pedal: np.ndarray, clock: TempoMap) -> tuple[np.ndarray, ...]:
    """Return onset, offset (seconds), pitch and velocity of a track with the pedal events `(P, 2)` folded in."""
    columns = track.notes.numpy()
    onset = columns["time"].astype(np.int64)
    offset = onset + columns["duration"]
    _check_ticks(onset)
    _check_ticks(columns["duration"])
    down, up = _pedal_intervals(pedal, offset.max())
    offset = _sustained(offset, down, up)
    return clock.seconds(onset), clock.seconds(offset), columns["pitch"], columns["velocity"]


def _pedal_events(track: Track) -> np.ndarray:
    """Return tick and value of each sustain pedal event, `(P, 2)` int64."""
    controls = track.controls.numpy()
    pedal = controls["number"] == SUSTAIN
    _check_ticks(controls["time"][pedal])
    return np.stack([controls["time"][pedal], controls["value"][pedal]], axis=1).astype(np.int64)


def _pedal_intervals(pedal: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ticks at which the pedal goes down and up, two arrays `(I,)`.

    A pedal that is down at the end is held until the last note-off or pedal event; symusic's `track.pedals` drops it.
    """
    tick, value = pedal[np.argsort(pedal[:, 0], kind="stable")].T
    edge = np.diff((value >= 64).astype(np.int8), prepend=0)
    down, up = tick[edge == 1], tick[edge == -1]
    if len(down) > len(up):
        up = np.append(up, max(end, tick[-1]))
    return down, up


def _sustained(offset: np.ndarray, down: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Move each offset inside a pedal interval [down, up) to its end."""
    if not len(down):
        return offset
    i = np.searchsorted(down, offset, side="right") - 1  # the last interval that begins at or before each offset
    return np.where(i >= 0, np.maximum(offset, up[i]), offset)


def _check_ticks(ticks: np.ndarray) -> None:
    """Raise `UserError` if ticks have overflowed: symusic's are int32, so that a negative one has wrapped around."""
    if len(ticks) and ticks.min() < 0:
        raise UserError(f"time stamp {ticks.min()}: ticks overflow, expected 0 or more")
