"""Gaps in training pieces: the model learns to play a passage that leads into given music.

    … music up to a | FILL | length | excerpt from b on | PLAY | the passage from a to b | the music from b on …

The events from FILL to PLAY are shown to the model before it plays the passage. They are not part of the music: after
PLAY the piece continues as if they were absent. Nothing is lost, and because the shown excerpt comes again, the model
learns to use its memory. This is infilling by reordering, as in Donahue et al. 2020 (arXiv 2005.05339) and Bavarian et
al. 2022 (arXiv 2207.14255), except that the music after a gap is first shown and then played as well.

FILL comes after the last event at time a, before time passes. The length counts from there, as a canonical pause. It is
never a whole number of seconds, so that its last TIME_SHIFT is recognizable even if the excerpt begins with some. The
excerpt is the music from b on, encoded by itself: only notes that begin at or after b, with times counted from b. It is
empty if no note follows.

Gaps are a pure function of (seed, epoch, piece), so a stream resumed in the middle of a piece continues with the same
tokens. The functions work on events: tokens of a subword vocabulary are converted.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.performance import (
    FILL,
    MAX_SHIFT,
    PLAY,
    TICKS_PER_SECOND,
    encode_notes,
    pause_ids,
    performance_grammar,
)

MIN_TICKS, MAX_TICKS = 2 * TICKS_PER_SECOND, 30 * TICKS_PER_SECOND  # from a to b
MIN_EXCERPT, MAX_EXCERPT = 64, 256  # events; fewer at the end of a piece
MIN_DISTANCE = 2000  # events from b to the next gap
EVENTS_PER_GAP = 4000  # events of a piece for each gap that it may have after the first
RANDOM_STREAM = 0x67617073  # separates the random bits from those of augmentation and dropout
LENGTHS = [ticks for ticks in range(MIN_TICKS, MAX_TICKS + 1) if ticks % MAX_SHIFT]
EXCERPTS = range(MIN_EXCERPT, MAX_EXCERPT + 1)


LEAD = 128  # events between what is shown and the gap when a model plays, see `lead_in`


class Gap(NamedTuple):
    """A gap before the event `place` of a piece, `ticks` long, with an excerpt of at most `events`."""

    place: int
    ticks: int
    events: int


def check_fill(tokenizer: Tokenizer, fill: float) -> None:
    """Raise `UserError` if pieces should have gaps but the vocabulary has no FILL and PLAY."""
    if fill and tokenizer.fill_id is None:
        raise UserError(f"fill = {fill}: the vocabulary {tokenizer.label} has no FILL and PLAY, expected 0")


def with_gaps(tokenizer: Tokenizer, ids: np.ndarray, fill: float, seed: int, epoch: int, piece: int) -> np.ndarray:
    """Return the ids `(T′,)` of a piece in an epoch, with gaps in a share `fill` of all pieces; ids: `(T,)`, augmented.

    Both have the tokenizer's dtype. A piece that gets no gap, or is too short for one, is returned unchanged. Without
    subwords, the ids of the result that are not shown are those of the piece. Raises `UserError` as `check_fill` does.
    """
    check_fill(tokenizer, fill)
    if not fill:
        return ids
    gaps = draw_gaps(tokenizer, ids, fill, seed, epoch, piece)
    return show_gaps(tokenizer, ids, gaps) if gaps else ids


def draw_gaps(tokenizer: Tokenizer, ids: np.ndarray, fill: float, seed: int, epoch: int, piece: int) -> list[Gap]:
    """Return the gaps that `with_gaps` shows in a piece, in order."""
    events = tokenizer.to_events(ids)
    return _draw_gaps(events, fill, _random_words(seed, epoch, piece, 2 + 3 * _max_gaps(events)))


def show_gaps(tokenizer: Tokenizer, ids: np.ndarray, gaps: Sequence[Gap]) -> np.ndarray:
    """Return the ids of a piece with the shown events of each gap inserted before it, see `show`."""
    events = tokenizer.to_events(ids)
    notes, ticks = tokenizer.decode(ids), performance_grammar().elapsed(events)
    parts = np.split(events, [gap.place for gap in gaps])
    for gap, i in zip(gaps, range(1, len(parts)), strict=True):
        shown = show(notes, (ticks[gap.place - 1] + gap.ticks) / TICKS_PER_SECOND, gap.ticks, gap.events)
        parts[i] = np.concatenate([shown, parts[i]])
    return tokenizer.from_events(np.concatenate(parts))


def show(notes: Notes, end: float, ticks: int, events: int) -> np.ndarray:
    """Return the events shown before a passage of `ticks`: FILL, the length, an excerpt and PLAY, int64 `(T,)`.

    notes: of the whole piece; end: the time b in seconds at which the passage ends; events: maximum of the excerpt.
    A length of whole seconds is ambiguous if the excerpt begins with a pause.
    """
    return np.concatenate([[FILL], pause_ids(ticks), excerpt(notes, end, events), [PLAY]]).astype(np.int64)


def lead_in(events: np.ndarray, place: int, end: int) -> int:
    """Return the place at which a model that plays is shown what follows a gap: some `LEAD` events before the gap.

    events: `(T,)`, at least those before the gap; place: of the gap; end: the tick at which it ends.

    What is shown comes between the music and the passage. Layers with a short memory would lose the last music before
    the gap just when the passage begins. So the model is shown what follows earlier, as if the gap began there, and
    then reads the last events before the gap: fewer if the gap would be longer than those of training, none if there
    are fewer than `LEAD`.
    """
    ticks, places = performance_grammar().elapsed(events[:place]), _places_between_moments(events[:place])
    far_enough = places[places <= place - LEAD]
    if not len(far_enough):
        return place
    lengths = end - ticks[places - 1]
    near_enough = places[(places >= far_enough[-1]) & (lengths <= MAX_TICKS) & (lengths % MAX_SHIFT > 0)]
    return int(near_enough[0]) if len(near_enough) else place


def with_lead(events: np.ndarray, gaps: Sequence[Gap]) -> list[Gap]:
    """Return the gaps of a piece as they are shown to a model that plays, see `lead_in`."""
    ticks, led = performance_grammar().elapsed(events), []
    for gap in gaps:
        end = int(ticks[gap.place - 1]) + gap.ticks
        place = lead_in(events, gap.place, end)
        led.append(Gap(place, end - int(ticks[place - 1]), gap.events))
    return led


def excerpt(notes: Notes, start: float, events: int) -> np.ndarray:
    """Return the first `events` of the notes that begin at or after `start` seconds, encoded by themselves: `(T,)`.

    Times count from `start`, so a pause may come first. Empty if no note begins then.
    """
    first = int(np.searchsorted(notes.onset, start - 0.5 / TICKS_PER_SECOND))
    following = notes.take(slice(first, first + events))  # each note has at least one event
    if not len(following):
        return np.empty(0, np.uint16)
    pause = round((following.onset[0] - start) * TICKS_PER_SECOND)
    return np.concatenate([pause_ids(pause), encode_notes(following)])[:events]


def _draw_gaps(events: np.ndarray, fill: float, words: Iterator[int]) -> list[Gap]:
    """Draw the gaps of a piece of events `(T,)`, in order: none with probability 1 − `fill`, or if it is too short.

    A gap that would reach past the end of the piece ends there. A gap too close to the one before is left out.
    """
    places, ticks = _places(events), performance_grammar().elapsed(events)
    if next(words) >> 11 >= fill * 2**53 or not len(places):
        return []
    number = _pick(next(words), range(1, _max_gaps(events) + 1))
    drawn = sorted(
        Gap(_pick(next(words), places), _pick(next(words), LENGTHS), _pick(next(words), EXCERPTS))
        for _ in range(number)
    )
    gaps, free = [], 0
    for gap in drawn:
        if gap.place < free:
            continue
        start = ticks[gap.place - 1]
        end = min(start + gap.ticks, ticks[-1])
        gaps.append(Gap(int(gap.place), int(end - start), gap.events))
        free = np.searchsorted(ticks, end) + MIN_DISTANCE
    return gaps


def _places(events: np.ndarray) -> np.ndarray:
    """Return the indices `(N,)` before which a gap may begin: after the last event of a time, not too near the end."""
    ticks, places = performance_grammar().elapsed(events), _places_between_moments(events)
    return places[ticks[-1] - ticks[places - 1] >= MIN_TICKS] if len(places) else places


def _places_between_moments(events: np.ndarray) -> np.ndarray:
    """Return the indices `(N,)` before which a pause begins, after the last key that is pressed or released."""
    grammar = performance_grammar()
    waits = grammar.ticks[events] > 0
    keys = (grammar.press[events] >= 0) | (grammar.release[events] >= 0)
    return np.flatnonzero(keys[:-1] & waits[1:]) + 1


def _max_gaps(events: np.ndarray) -> int:
    return 1 + len(events) // EVENTS_PER_GAP


def _random_words(seed: int, epoch: int, piece: int, n: int) -> Iterator[int]:
    """Return n random integers below 2^64, a pure function of the first three arguments."""
    # Not a Generator: its draws may differ between NumPy versions, and a run may be resumed with another version.
    sequence = np.random.SeedSequence(seed, spawn_key=(epoch, piece, RANDOM_STREAM))
    return iter(sequence.generate_state(n, np.uint64).tolist())


def _pick(word: int, options: Sequence[int] | np.ndarray) -> int:
    """Return one of the options, chosen by 64 random bits."""
    return options[word * len(options) >> 64]
