"""Figures of a piece: how many notes, how many at once, how long the silences."""

import json
import math
from dataclasses import dataclass, replace

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.notes import Notes

NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


def pitch_name(pitch: int) -> str:
    """C4 for 60, the middle C."""
    return f"{NAMES[pitch % 12]}{pitch // 12 - 1}"


@dataclass(frozen=True)
class Summary:
    """Figures of a piece. Pitches are None, and all else is 0, when there are no notes.

    seconds: until the last offset; mean_polyphony: notes that sound at once, averaged over the time in which any
    does; longest_silence: seconds before the last offset in which none sounds.
    """

    notes: int
    seconds: float
    lowest: int | None
    highest: int | None
    mean_polyphony: float
    max_polyphony: int
    longest_silence: float

    @property
    def notes_per_second(self) -> float:
        return self.notes / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        if self.lowest is None or self.highest is None:
            return "no notes"
        low, high = pitch_name(self.lowest), pitch_name(self.highest)
        return (
            f"{self.notes:,} note{'s' * (self.notes != 1)} in {self.seconds:,.1f} s, "
            f"{self.notes_per_second:.1f} a second, {low if low == high else f'{low} to {high}'}, "
            f"{self.mean_polyphony:.1f} at once, {self.max_polyphony} at most, "
            f"longest silence {self.longest_silence:.1f} s"
        )


def sounding(notes: Notes) -> tuple[np.ndarray, np.ndarray]:
    """How many notes sound at once, from 0 s to the last offset, and for how many seconds: two arrays (2N,)."""
    time = np.concatenate([[0.0], notes.offset, notes.onset])
    change = np.repeat([0, -1, 1], [1, len(notes), len(notes)])
    order = np.lexsort((change, time))  # a note that ends when another begins does not sound with it
    return np.cumsum(change[order])[:-1], np.diff(time[order])


def longest_silence(notes: Notes) -> tuple[float, float]:
    """The longest time before the last onset in which nothing sounds, and when it begins, in seconds; 0, 0 if none."""
    if not len(notes):
        return 0.0, 0.0
    # Silence may be made of several stretches of no length: it goes from where a note ends to where the next begins.
    ends = np.append(0.0, np.maximum.accumulate(notes.offset)[:-1])
    silence = np.maximum(notes.onset - ends, 0.0)
    i = int(silence.argmax())
    return (float(silence[i]), float(ends[i])) if silence[i] else (0.0, 0.0)


def summarize(notes: Notes) -> Summary:
    """The figures of a piece."""
    if not len(notes):
        return Summary(0, 0.0, None, None, 0.0, 0, 0.0)
    voices, seconds = sounding(notes)
    heard = seconds[voices > 0].sum()
    return Summary(
        notes=len(notes),
        seconds=notes.duration,
        lowest=int(notes.pitch.min()),
        highest=int(notes.pitch.max()),
        mean_polyphony=float((voices * seconds).sum() / heard) if heard else 0.0,
        max_polyphony=max(int(voices.max()), 1),
        longest_silence=longest_silence(notes)[0],
    )


def excerpt(notes: Notes, start: float = 0.0, seconds: float | None = None) -> Notes:
    """The notes that are struck in `seconds` from `start` on (to the end if None), cut there; `start` becomes 0.

    What was struck before `start` is left out, even if it still sounds: it could only be heard as struck anew.
    Raises `UserError`, in terms of the command line, for a part that is empty or begins after the end.
    """
    if not start >= 0:
        raise UserError(f"--start {start:g}: expected 0 or more")
    if seconds is not None and not seconds > 0:
        raise UserError(f"--seconds {seconds:g}: expected more than 0")
    if start and start >= notes.duration:
        raise UserError(f"--start {start:g}: the music lasts {notes.duration:.2f} s, expected less")
    end = math.inf if seconds is None else start + seconds
    struck = notes.take((notes.onset >= start) & (notes.onset < end))
    return replace(struck, offset=np.minimum(struck.offset, end)).shifted(-start)


def stored_pairs(stored: str | None) -> list[tuple[str, str]]:
    """The text of a MIDI file as names and values: those of the JSON object that a generation leaves in it, without
    what is null; else the text itself, called "text". Nothing for None.
    """
    try:
        values = json.loads(stored or "")
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict):
        return [(name, v if isinstance(v, str) else json.dumps(v)) for name, v in values.items() if v is not None]
    return [("text", stored)] if stored else []
