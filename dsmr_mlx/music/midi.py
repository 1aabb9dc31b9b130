"""MIDI ⇄ notes: reading a performance with its tempo map and sustain pedal, and writing one in real time.

A performance is here nothing but notes in seconds, of one piano or of several instruments. The tempo map is followed
in float64 (symusic's own ``to("second")`` is float32), and the sustain pedal is folded into the notes, so that what
follows needs to know of neither. symusic parses and writes the files; it is imported on first use, because a machine
that trains on a prepared corpus needs no MIDI library.
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

SUSTAIN = 64  # the controller's number; values from 64 on mean that the pedal is down
DEFAULT_TEMPO = 500_000  # microseconds per quarter until the first tempo event: 120 BPM
TPQ = 500  # at 120 BPM one tick is 1 ms, so the 10 ms grid of the tokens is written exactly


@dataclass(frozen=True)
class Extent:
    """How large a MIDI file may be to be read: in bytes, notes and seconds."""

    bytes: int
    notes: int
    seconds: float


MUSIC = Extent(256 << 20, 20_000_000, 2e6)  # days of it: whatever this program may have written
PIECE = Extent(64 << 20, 500_000, 4 * 3600.0)  # in a corpus, where a longer file is hardly a piece of music


def read_notes(
    source: bytes | str | os.PathLike, *, programs: bool = False, may_be_empty: bool = False, most: Extent = MUSIC
) -> Notes:
    """The notes of a MIDI file, given by its path or its bytes; the first onset is at 0 s.

    All tracks but the drums' are merged into one instrument; with `programs` the tracks of each program are, and
    drums stay. The sustain pedal (CC64) of a track, or of the other tracks with its program if it has none, is folded
    into its notes by Magenta's rule: a note whose key goes up while the pedal is down lasts until the pedal goes up, or
    until its pitch is struck again. No two notes of one pitch and program overlap in the result. Pedal events in a
    track that has no notes are not seen (symusic drops such tracks), and neither are notes that never end.

    Raises UserError, naming the file if a path was given, when it cannot be read, is not a MIDI file, or is
    out of bounds: larger, longer or of more notes than `most`, no pitched note (unless it `may_be_empty`), a
    tempo or a resolution of 0, time stamps that overflow.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return _notes(_score(bytes(source)), programs, may_be_empty, most)
    try:
        return _notes(_score(read_bytes(source, most)), programs, may_be_empty, most)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def read_bytes(path: str | os.PathLike, most: Extent = MUSIC) -> bytes:
    """The bytes of a MIDI file. Raises UserError (without the path) if unreadable or out of bounds."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(most.bytes + 1)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})") from error
    if len(data) > most.bytes:
        raise UserError(f"larger than {most.bytes >> 20} MiB, which is too large for a piece of music")
    return data


def read_text(path: str | os.PathLike) -> str | None:
    """The text that `write_notes` stored in a file (its first marker), None if it has none.

    Raises UserError naming the file when it is not a MIDI file.
    """
    try:
        markers = _score(read_bytes(path)).markers
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return markers[0].text if len(markers) else None


def midi_bytes(notes: Notes, text: str | None = None) -> bytes:
    """Notes as a standard MIDI file at 120 BPM, 1 tick = 1 ms: one piano track, or one for each program, with drums
    on channel 10. Same notes, same bytes.

    text: stored as a marker at the start, read again by `read_text`.
    """
    from symusic import Score, Tempo, TextMeta

    score = Score(TPQ)
    score.tempos.append(Tempo(0, 120))
    for program in notes.programs:
        played = notes if notes.program is None else notes.take(notes.program == program)
        name = "piano" if notes.program is None else "drums" if program == DRUMS else f"program {program}"
        score.tracks.append(_written(played, name, program))
    if text is not None:
        score.markers.append(TextMeta(0, text))
    return score.dumps_midi()


def _written(notes: Notes, name: str, program: int) -> Track:
    """Notes of one instrument as a track of a score whose ticks are milliseconds."""
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
    """Write `midi_bytes(notes, text)` to `path`, all or nothing: an existing file stays whole until the end.

    Raises UserError naming the file when it cannot be written.
    """
    try:
        write_atomically(path, midi_bytes(notes, text))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def _score(data: bytes) -> Score:
    """Parse bytes, RIFF-wrapped (RMID) ones too."""
    from symusic import Score

    if data[:4] == b"RIFF":
        data = data[max(data.find(b"MThd"), 0) :]
    if data[:4] != b"MThd":
        found = "it does not begin with MThd; audio is not MIDI" if data else "it is empty"
        raise UserError(f"not a readable MIDI file ({found})")
    try:
        return Score.from_midi(data)
    except Exception as error:  # what symusic raises for bad bytes is not documented
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"not a readable MIDI file ({reason})") from error


def _notes(score: Score, programs: bool, may_be_empty: bool, most: Extent) -> Notes:
    """Merge the tracks of a score, all or by program, in seconds, with the pedal folded and the first onset at 0."""
    if score.note_num() > most.notes:
        raise UserError(f"{score.note_num()} notes, expected at most {most.notes}")
    tracks = [track for track in score.tracks if len(track.notes) and (programs or not track.is_drum)]
    if not tracks and may_be_empty:
        return Notes.empty()
    if not tracks:
        raise UserError(f"no {'' if programs else 'pitched '}note, expected at least one")
    clock = TempoMap.of(score)
    pedals = {id(track): _pedal_events(track) for track in tracks}
    parts = []
    for track in tracks:
        # Both hands of a piano often have a track each, and only one of them the pedal.
        hands = [track] if len(pedals[id(track)]) else [t for t in tracks if _program(t) == _program(track)]
        onset, offset, pitch, velocity = _track_notes(track, np.concatenate([pedals[id(h)] for h in hands]), clock)
        parts.append((onset, offset, pitch, velocity, np.full(len(onset), _program(track))))
    *columns, program = (np.concatenate(column) for column in zip(*parts, strict=True))
    notes = without_overlaps(*columns, program if programs else None).from_first_onset()
    if not notes.duration <= most.seconds:
        raise UserError(f"{notes.duration:.0f} s long, expected at most {most.seconds:.0f} s")
    return notes


def _program(track: Track) -> int:
    return DRUMS if track.is_drum else track.program


@dataclass(frozen=True)
class TempoMap:
    """Ticks to seconds in float64, piecewise linear between tempo events.

    tick: (K,) int64, where each tempo begins, the first at 0; tempo: (K,) float64, microseconds per quarter;
    elapsed: (K,) float64, microseconds × tpq at those ticks.
    """

    tick: np.ndarray
    tempo: np.ndarray
    elapsed: np.ndarray
    tpq: int

    @classmethod
    def of(cls, score: Score) -> TempoMap:
        """The tempo map of a score; UserError for a tempo or a resolution that is not positive."""
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
        """(N,) integer ticks → (N,) float64 seconds; of several tempi at one tick the last counts."""
        i = np.searchsorted(self.tick, ticks, side="right") - 1
        return (self.elapsed[i] + (ticks - self.tick[i]) * self.tempo[i]) / (1e6 * self.tpq)


def _track_notes(track: Track, pedal: np.ndarray, clock: TempoMap) -> tuple[np.ndarray, ...]:
    """onset, offset (seconds), pitch, velocity of one track, the pedal `(N, 2)` folded in."""
    columns = track.notes.numpy()
    onset = columns["time"].astype(np.int64)
    offset = onset + columns["duration"]
    _check_ticks(onset)
    _check_ticks(columns["duration"])
    down, up = _pedal_intervals(pedal, offset.max())
    offset = _sustained(offset, down, up)
    return clock.seconds(onset), clock.seconds(offset), columns["pitch"], columns["velocity"]


def _pedal_events(track: Track) -> np.ndarray:
    """(N, 2) int64: tick and value of each sustain pedal event."""
    controls = track.controls.numpy()
    pedal = controls["number"] == SUSTAIN
    _check_ticks(controls["time"][pedal])
    return np.stack([controls["time"][pedal], controls["value"][pedal]], axis=1).astype(np.int64)


def _pedal_intervals(pedal: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Ticks at which the pedal goes down and up again.

    symusic's `track.pedals` would forget a pedal that is still down at the end; here it is held until the last
    note-off or pedal event.
    """
    tick, value = pedal[np.argsort(pedal[:, 0], kind="stable")].T
    edge = np.diff((value >= 64).astype(np.int8), prepend=0)
    down, up = tick[edge == 1], tick[edge == -1]
    if len(down) > len(up):
        up = np.append(up, max(end, tick[-1]))
    return down, up


def _sustained(offset: np.ndarray, down: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Move each offset that falls into a pedal interval [down, up) to the interval's end."""
    if not len(down):
        return offset
    i = np.searchsorted(down, offset, side="right") - 1
    return np.where(i >= 0, np.maximum(offset, up[i]), offset)


def _check_ticks(ticks: np.ndarray) -> None:
    """symusic's ticks are int32 and wrap around; a negative one says that they did."""
    if len(ticks) and ticks.min() < 0:
        raise UserError(f"a time stamp of {ticks.min()} ticks (they overflow), expected 0 or more")
