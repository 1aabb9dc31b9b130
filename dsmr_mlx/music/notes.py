"""`Notes`, the representation of music in all packages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

PITCHES = 128
MIN_SECONDS = 0.001  # of a note; a shorter one is extended
DRUMS = 128  # program number of the drums, after the programs 0..127
PIANOS = range(8)  # General MIDI programs


@dataclass(frozen=True, eq=False)
class Notes:
    """Notes of one piece, N of each, sorted by (onset, pitch).

    onset, offset: `(N,)` float64, seconds; pitch: `(N,)` uint8, 0..127; velocity: `(N,)` uint8, 1..127; program: `(N,)`
    uint8, General MIDI programs 0..127 or `DRUMS`, or None for music of one instrument. Array-likes are converted but
    not sorted; `Notes.sorted` sorts. Raises `ValueError` if the lengths differ.
    """

    onset: np.ndarray
    offset: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray
    program: np.ndarray | None = None

    def __post_init__(self) -> None:
        columns = {"onset": float, "offset": float, "pitch": np.uint8, "velocity": np.uint8}
        if self.program is not None:
            columns["program"] = np.uint8
        for name, dtype in columns.items():
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))
        lengths = {len(getattr(self, name)) for name in columns}
        if len(lengths) != 1:
            raise ValueError(f"Notes: arrays of lengths {sorted(lengths)}, expected one length")

    @classmethod
    def empty(cls) -> Notes:
        """Return no notes."""
        return cls([], [], [], [])

    @classmethod
    def sorted(cls, onset, offset, pitch, velocity, program=None) -> Notes:
        """Return notes from arrays in any order."""
        order = np.lexsort((pitch, onset) if program is None else (program, pitch, onset))
        columns = (onset, offset, pitch, velocity) if program is None else (onset, offset, pitch, velocity, program)
        return cls(*(np.asarray(column)[order] for column in columns))

    @classmethod
    def of(cls, rows: Iterable[Sequence[float]]) -> Notes:
        """Return notes from rows (onset, offset, pitch, velocity) in any order, such as `generate` yields."""
        return cls.sorted(*zip(*rows, strict=True)) if (rows := list(rows)) else cls.empty()

    @property
    def programs(self) -> list[int]:
        """The programs in ascending order; [0], a piano, for music of one instrument."""
        return [0] if self.program is None else np.unique(self.program).tolist()

    @property
    def voices(self) -> np.ndarray:
        """A number `(N,)` for each combination of pitch and program, below 2¹⁵."""
        return self.pitch + 128 * (np.int64(0) if self.program is None else self.program.astype(np.int64))

    def count_common(self, other: Notes) -> int:
        """Return how many notes both have in common by pitch and program, whatever their times."""
        here, there = (np.bincount(notes.voices, minlength=1 << 15) for notes in (self, other))
        return int(np.minimum(here, there).sum())

    @property
    def rows(self) -> list[tuple[float, float, int, int]]:
        """The notes as rows: onset, offset, pitch, velocity."""
        columns = (self.onset, self.offset, self.pitch, self.velocity)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def take(self, index) -> Notes:
        """Return some of the notes, by a mask `(N,)` or by ascending indices."""
        columns = (self.onset, self.offset, self.pitch, self.velocity, self.program)
        return Notes(*(None if column is None else column[index] for column in columns))

    def from_first_onset(self) -> Notes:
        """Return the notes shifted so that the first onset is at 0 s."""
        return self.shifted(-self.onset[0]) if len(self) else self

    def shifted(self, seconds: float) -> Notes:
        """Return the notes shifted by some seconds."""
        return Notes(self.onset + seconds, self.offset + seconds, self.pitch, self.velocity, self.program)

    @property
    def lost_as_piano(self) -> str | None:
        """What `as_piano` loses, such as "3 instruments are read as one, drums are left out"; None if nothing."""
        pitched = {0 if program in PIANOS else program for program in self.programs if program != DRUMS}
        merged = [f"{len(pitched)} instruments are read as one"] if len(pitched) > 1 else []
        return ", ".join(merged + ["drums are left out"] * (DRUMS in self.programs)) or None

    def as_piano(self) -> Notes:
        """Return all notes except drums as one instrument, without overlaps of a pitch."""
        if self.program is None:
            return self
        pitched = self.take(self.program != DRUMS)
        return without_overlaps(pitched.onset, pitched.offset, pitched.pitch, pitched.velocity)

    @property
    def duration(self) -> float:
        """The time of the last offset in seconds, 0.0 without notes."""
        return float(self.offset.max()) if len(self) else 0.0

    def __len__(self) -> int:
        return len(self.onset)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Notes):
            return NotImplemented
        if (self.program is None) != (other.program is None):
            return False
        names = [name for name in self.__dataclass_fields__ if getattr(self, name) is not None]
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)

    __hash__ = None


def without_overlaps(onset, offset, pitch, velocity, program=None) -> Notes:
    """Return notes from arrays in any order: of each (onset, pitch, program) the longest, then the loudest.

    A note lasts at least `MIN_SECONDS` and ends when the same program plays its pitch again.
    """
    voice = pitch.astype(np.int64) + (0 if program is None else 128 * program.astype(np.int64))
    onset, offset, voice, velocity = cut_overlaps(onset, offset, voice, velocity, MIN_SECONDS)
    return Notes.sorted(onset, offset, voice % 128, velocity, None if program is None else voice // 128)


def cut_overlaps(
    onset: np.ndarray, offset: np.ndarray, voice: np.ndarray, velocity: np.ndarray, min_length: float
) -> tuple[np.ndarray, ...]:
    """Return the four columns of notes, `(N,)` each, sorted by (voice, onset), without overlaps within a voice.

    Of each (voice, onset) the longest note is kept, then the loudest. A note lasts at least `min_length`, in the unit
    of the times, and ends at the next onset of its voice.
    """
    order = np.lexsort((onset, voice.astype(np.int16)))  # voices are below 2¹⁵; NumPy sorts 16 bits much faster
    last = _last_of_each(voice[order], onset[order])
    if not last.all():  # few pieces need all four keys
        order = np.lexsort((velocity, offset, onset, voice))
        last = _last_of_each(voice[order], onset[order])  # the longest and loudest
    onset, offset, voice, velocity = onset[order], offset[order], voice[order], velocity[order]
    onset, offset, voice, velocity = onset[last], offset[last], voice[last], velocity[last]
    offset = np.maximum(offset, onset + min_length)
    again = voice[1:] == voice[:-1]  # the next element is the next note of the same voice
    offset[:-1] = np.where(again, np.minimum(offset[:-1], onset[1:]), offset[:-1])
    return onset, offset, voice, velocity


def _last_of_each(voice: np.ndarray, onset: np.ndarray) -> np.ndarray:
    """Return True `(N,)` at the last note of each (voice, onset), for sorted notes."""
    return np.append((voice[1:] != voice[:-1]) | (onset[1:] != onset[:-1]), True)[: len(voice)]
