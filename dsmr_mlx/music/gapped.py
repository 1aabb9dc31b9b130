"""Music with gaps to fill: made by removing passages, inserting time, or joining two pieces.

Everything outside the gaps stays as it is, note for note. Notes that begin before a gap and sound into it keep their
ends, unless they are cut.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.notes import MIN_SECONDS, Notes

MAX_GAP_SECONDS = 3600
SAME_MOMENT = 0.02  # seconds: a note that begins at most this long before its key is free is delayed until then


@dataclass(frozen=True)
class GappedMusic:
    """Music with at least one gap, in seconds.

    notes: the given notes; none begins in a gap. gaps: pairs (start, end), in order, without overlap.
    """

    notes: Notes
    gaps: tuple[tuple[float, float], ...]

    @property
    def before(self) -> Notes:
        """The notes before the first gap; they may sound into it."""
        return self.notes.take(self.notes.onset < self.gaps[0][0])

    @property
    def after(self) -> Notes:
        """The notes between the first gap and the next one. If there are none, all after the first gap."""
        onset, end = self.notes.onset, self.gaps[0][1]
        after = self.notes.take(onset >= end)
        if len(self.gaps) == 1:
            return after
        between = after.take(after.onset < self.gaps[1][0])
        return between if len(between) else after

    def fitted(self, passage: Notes) -> Notes:
        """Return the notes of a passage that fit into the first gap, cut at its end.

        A note is left out if it begins while the same pitch still sounds from before the gap. A piano has one key for
        each pitch.
        """
        (start, end), given = self.gaps[0], self.notes
        if passage.program is None and given.program is not None:
            passage = replace(passage, program=np.full(len(passage), given.programs[0]))
        sounding = given.take((given.onset < start) & (given.offset > start))
        free = dict(zip(sounding.voices.tolist(), sounding.offset.tolist(), strict=True))
        free_from = np.array([free.get(voice, start) for voice in passage.voices.tolist()])
        onset, offset = np.maximum(passage.onset, free_from), np.minimum(passage.offset, end)
        fits = (onset - passage.onset <= SAME_MOMENT) & (offset - onset >= MIN_SECONDS)
        return replace(passage, onset=onset, offset=offset).take(fits)

    def filled(self, passage: Notes) -> "GappedMusic":
        """Return the music with the notes of `fitted` in its first gap; the other gaps remain."""
        return GappedMusic(joined(self.notes, self.fitted(passage)), self.gaps[1:])


def joined(*parts: Notes) -> Notes:
    """Return the notes of several parts as one; all or none of them have programs."""
    names = ("onset", "offset", "pitch", "velocity") + (("program",) if parts[0].program is not None else ())
    return Notes.sorted(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def replaced(notes: Notes, spans: Sequence[tuple[float, float]], cut: bool = False) -> GappedMusic:
    """Remove passages from a piece: all notes that begin in one of the `spans` (start, end), in seconds.

    cut: also end earlier notes at the start of a span. Raises `UserError` for a span that is outside the piece, empty
    or longer than an hour, for spans that overlap, and if no note is left.
    """
    spans = sorted((float(start), float(end)) for start, end in spans)
    for start, end in spans:
        _check_span(notes, start, end)
    for (start, end), (other, last) in pairwise(spans):
        if other < end:
            raise UserError(
                f"`replace` {_span(other, last)}: overlaps {_span(start, end)}; expected passages apart, or one passage"
            )
    inside = np.zeros(len(notes), bool)
    for start, end in spans:
        inside |= (notes.onset >= start) & (notes.onset < end)
    if inside.all():
        raise UserError(
            f"`replace` {_span(*spans[0])}: no note of the piece is left; replace a part of it, or generate without a "
            "prompt"
        )
    left = notes.take(~inside)
    for start, _ in spans if cut else ():
        left = cut_at(left, start)
    return GappedMusic(left, tuple(spans))


def inserted(notes: Notes, at: float, seconds: float, cut: bool = False) -> GappedMusic:
    """Insert a gap of `seconds` at the time `at`: later notes are shifted. Notes that sound there keep their lengths.

    cut: end them there instead. Raises `UserError` for a place outside the piece or an invalid length.
    """
    _check_length("seconds", seconds)
    if not 0 <= at <= notes.duration:
        raise UserError(f"`insert` {at:g}: expected 0 to {notes.duration:.2f}, the seconds that the piece lasts")
    later = notes.onset >= at
    moved = joined(notes.take(~later), notes.take(later).shifted(seconds))
    return GappedMusic(cut_at(moved, at) if cut else moved, ((float(at), float(at + seconds)),))


def led(notes: Notes, other: Notes, seconds: float, until: float | None = None, cut: bool = False) -> GappedMusic:
    """Append another piece to a piece, after a gap of some seconds.

    until: when the gap begins, in seconds; later notes of the first piece are dropped; None: at the end of its last
    note. Its notes may sound until the other piece begins. cut: end them where the gap begins. Raises `UserError` for
    an invalid length.
    """
    _check_length("seconds", seconds)
    until = notes.duration if until is None else float(until)
    first = notes.take(notes.onset < until)
    if not len(first):
        raise UserError(f"`until` {until:g}: no note of the piece begins before")
    end = until + seconds
    if (first.program is None) != (other.program is None):
        raise UserError("`lead_to`: another instrument than that of the first piece, expected the same")
    first = cut_at(first, until if cut else end)
    return GappedMusic(joined(first, other.from_first_onset().shifted(end)), ((until, end),))


def cut_at(notes: Notes, time: float) -> Notes:
    """Return the notes, with those that begin before a time cut there."""
    latest = np.maximum(time, notes.onset + MIN_SECONDS)
    return replace(notes, offset=np.where(notes.onset < time, np.minimum(notes.offset, latest), notes.offset))


def _check_span(notes: Notes, start: float, end: float) -> None:
    name = f"`replace` {_span(start, end)}"
    if not (math.isfinite(start) and math.isfinite(end) and start >= 0):
        raise UserError(f"{name}: expected START-END in seconds, such as 12.5-20")
    if not start < end:
        raise UserError(f"{name}: expected an end after the start")
    if end - start > MAX_GAP_SECONDS:
        raise UserError(f"{name}: {end - start:,.0f} s long, expected at most {MAX_GAP_SECONDS:,}")
    if start >= notes.duration:
        raise UserError(f"{name}: the piece lasts {notes.duration:.2f} s, expected a passage that begins before")


def _check_length(name: str, seconds: float) -> None:
    if not 0 < seconds <= MAX_GAP_SECONDS:
        raise UserError(f"`{name}` {seconds:g}: expected more than 0 and at most {MAX_GAP_SECONDS:,}")


def _span(start: float, end: float) -> str:
    return f"{start:g}-{end:g}"
