"""Notes: the one representation of music that everything else shares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MIN_SECONDS = 0.001  # what a note of no length is given
DRUMS = 128  # what stands for the drum set among the programs 0..127


@dataclass(frozen=True, eq=False)
class Notes:
    """Notes of one piece, N of each, sorted by (onset, pitch).

    onset, offset: (N,) float64, seconds; pitch: (N,) uint8, 0..127; velocity: (N,) uint8, 1..127; program: (N,)
    uint8, the General MIDI program 0..127 that plays, `DRUMS` for drums, or None for music of one instrument.
    Anything array-like is taken and converted; the caller sorts (`Notes.sorted` does). Raises ValueError
    when the lengths differ.
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
            raise ValueError(f"Notes: arrays of {sorted(lengths)} notes, expected one length")

    @classmethod
    def empty(cls) -> Notes:
        """No notes."""
        return cls([], [], [], [])

    @classmethod
    def sorted(cls, onset, offset, pitch, velocity, program=None) -> Notes:
        """Notes from arrays in any order."""
        order = np.lexsort((pitch, onset) if program is None else (program, pitch, onset))
        columns = (onset, offset, pitch, velocity) if program is None else (onset, offset, pitch, velocity, program)
        return cls(*(np.asarray(column)[order] for column in columns))

    @classmethod
    def of(cls, rows: Iterable[Sequence[float]]) -> Notes:
        """Notes from rows (onset, offset, pitch, velocity) in any order, such as those that `generation.generate` gives
        one by one.
        """
        return cls.sorted(*zip(*rows, strict=True)) if (rows := list(rows)) else cls.empty()

    @property
    def programs(self) -> list[int]:
        """The programs that play, rising; [0], a piano, for music of one instrument."""
        return [0] if self.program is None else np.unique(self.program).tolist()

    @property
    def rows(self) -> list[tuple[float, float, int, int]]:
        """The notes one by one: onset, offset, pitch, velocity."""
        columns = (self.onset, self.offset, self.pitch, self.velocity)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def take(self, index) -> Notes:
        """Some of the notes, by a mask (N,) or by rising numbers."""
        columns = (self.onset, self.offset, self.pitch, self.velocity, self.program)
        return Notes(*(None if column is None else column[index] for column in columns))

    def from_first_onset(self) -> Notes:
        """The same, with the first onset at 0 s."""
        return self.shifted(-self.onset[0]) if len(self) else self

    def shifted(self, seconds: float) -> Notes:
        """The same, so many seconds later."""
        return Notes(self.onset + seconds, self.offset + seconds, self.pitch, self.velocity, self.program)

    def as_piano(self) -> Notes:
        """All but the drums as one instrument; no two notes of one pitch overlap."""
        if self.program is None:
            return self
        pitched = self.take(self.program != DRUMS)
        return without_overlaps(pitched.onset, pitched.offset, pitched.pitch, pitched.velocity)

    @property
    def duration(self) -> float:
        """Seconds until the last offset, 0.0 when there are no notes."""
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
    """Notes from arrays in any order, one for each (onset, pitch, program), the longest, then the loudest.

    A note lasts at least `MIN_SECONDS`, and ends when its pitch is struck again by the same program.
    """
    voice = pitch.astype(np.int64) + (0 if program is None else 128 * program.astype(np.int64))
    order = np.lexsort((velocity, offset, onset, voice))
    onset, offset, voice, velocity = onset[order], offset[order], voice[order], velocity[order]
    last = np.append((voice[1:] != voice[:-1]) | (onset[1:] != onset[:-1]), True)[: len(voice)]
    onset, offset, voice, velocity = onset[last], offset[last], voice[last], velocity[last]
    struck = np.append(np.where(voice[1:] == voice[:-1], onset[1:], np.inf), np.inf)[: len(voice)]
    offset = np.minimum(np.maximum(offset, onset + MIN_SECONDS), struck)
    return Notes.sorted(onset, offset, voice % 128, velocity, None if program is None else voice // 128)


PITCHES = 128
