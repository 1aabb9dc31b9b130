"""Statistics of a piece (notes, polyphony, silences), excerpts, and the division into systems."""

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.notes import Notes

PITCH_NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


def pitch_name(pitch: int) -> str:
    """Return the name of a pitch: C4 for 60, middle C."""
    return f"{PITCH_NAMES[pitch % 12]}{pitch // 12 - 1}"


@dataclass(frozen=True)
class Summary:
    """Statistics of a piece. Without notes the pitches are None and the rest is 0.

    seconds: time of the last offset; lowest, highest: pitches; mean_polyphony: notes sounding at once, averaged over
    the time in which any sounds; longest_silence: in seconds, before the last onset.
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
        """Notes per second, 0 without notes."""
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
    """Return how many notes sound at once, and for how many seconds, from 0 s to the last offset: both `(2N,)`."""
    time = np.concatenate([[0.0], notes.offset, notes.onset])
    change = np.repeat([0, -1, 1], [1, len(notes), len(notes)])
    order = np.lexsort((change, time))  # at equal times offsets come first
    return np.cumsum(change[order])[:-1], np.diff(time[order])


def longest_silence(notes: Notes) -> tuple[float, float]:
    """Return length and start, in seconds, of the longest silence before the last onset; 0, 0 without silence."""
    if not len(notes):
        return 0.0, 0.0
    # The latest offset before each onset; the intervals of `sounding` may split one silence into several.
    ends = np.append(0.0, np.maximum.accumulate(notes.offset)[:-1])
    silence = np.maximum(notes.onset - ends, 0.0)
    i = int(silence.argmax())
    return (float(silence[i]), float(ends[i])) if silence[i] else (0.0, 0.0)


def summarize(notes: Notes) -> Summary:
    """Return the statistics of a piece."""
    if not len(notes):
        return Summary(0, 0.0, None, None, 0.0, 0, 0.0)
    voices, seconds = sounding(notes)
    total = seconds[voices > 0].sum()
    return Summary(
        notes=len(notes),
        seconds=notes.duration,
        lowest=int(notes.pitch.min()),
        highest=int(notes.pitch.max()),
        mean_polyphony=float((voices * seconds).sum() / total) if total else 0.0,
        max_polyphony=max(int(voices.max()), 1),
        longest_silence=longest_silence(notes)[0],
    )


def excerpt(notes: Notes, start: float = 0.0, seconds: float | None = None) -> Notes:
    """Return the notes that begin in the `seconds` (None: all) from `start` on, cut at the end; `start` becomes 0 s.

    Notes that begin before `start` are left out even if they still sound, because they would be played again. Raises
    `UserError` if `start` is negative or after the end, or `seconds` is not positive.
    """
    if not start >= 0:
        raise UserError(f"`start` {start:g}: expected 0 or more")
    if seconds is not None and not seconds > 0:
        raise UserError(f"`seconds` {seconds:g}: expected more than 0")
    if start and start >= notes.duration:
        raise UserError(f"`start` {start:g}: the music lasts {notes.duration:.2f} s, expected less")
    end = math.inf if seconds is None else start + seconds
    inside = notes.take((notes.onset >= start) & (notes.onset < end))
    return replace(inside, offset=np.minimum(inside.offset, end)).shifted(-start)


def break_into_systems(
    duration: float, preferred_seconds: float, min_seconds: float, max_systems: int
) -> tuple[int, float]:
    """Return how many systems to draw, 1 to `max_systems`, and the seconds of each, at least `min_seconds`.

    They are about `preferred_seconds` long if `max_systems` allows it. Raises `UserError` if `max_systems` is below 1.
    """
    if max_systems < 1:
        raise UserError(f"`systems` {max_systems}: expected at least 1")
    n = min(max(math.ceil(duration / preferred_seconds), 1), max_systems)
    return n, max(duration / n, min_seconds)


def text_fields(stored: str | None) -> list[tuple[str, str]]:
    """Return the text of a MIDI file (`midi.read_text`) as names and values.

    A JSON object, as a generation stores it, gives its entries without nulls; any other text is one field, "text".
    """
    try:
        values = json.loads(stored or "")
        if isinstance(values, dict):
            return [(name, _in_words(value)) for name, value in values.items() if value is not None]
    except (ValueError, RecursionError):
        pass
    return [("text", stored)] if stored else []


def _in_words(value: Any) -> str:
    """Return a JSON value as text: `Tempo (bias 0.08), LoopPenalty (penalty 1)` for objects with a `kind`."""
    match value:
        case None | bool():
            return {True: "yes", False: "no", None: "none"}[value]
        case float():
            return f"{value:.6g}"
        case list():
            return ", ".join(map(_in_words, value))
        case dict():
            kind = value.get("kind")
            options = ", ".join(f"{name} {_in_words(each)}" for name, each in value.items() if name != "kind")
            return options if kind is None else f"{kind} ({options})" if options else str(kind)
    return str(value)
