"""The performance events of Oore et al. 2018, "This Time with Feeling" (arXiv 1808.03715, section 3.2).

    0 PAD, 1 BOS, 2 EOS, 3..130 NOTE_ON, 131..258 NOTE_OFF, 259..358 TIME_SHIFT 10 ms … 1 s, 359..390 VELOCITY,
    391 FILL, 392 PLAY

A note is a VELOCITY (only if it differs from the last one), a NOTE_ON and, later, a NOTE_OFF; TIME_SHIFTs advance the
clock in ticks of 10 ms. One piece has exactly one *canonical* stream: at one time NOTE_OFFs come before NOTE_ONs, each
by pitch; a pause is as many full seconds as fit, then the rest; the stream starts with a VELOCITY, ends with a
NOTE_OFF, and no key sounds after it. FILL and PLAY are not from the paper: the ids from FILL to PLAY are shown to a
model and are not part of the music, see `dsmr_mlx.data.gaps`. The codec works on whole arrays: a few sorts and
cumulative sums, in both directions.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import numpy as np

from dsmr_mlx.music.notes import PITCHES, Notes, cut_overlaps
from dsmr_mlx.tokenizers.base import Tokenizer, shown_mask
from dsmr_mlx.tokenizers.event_grammar import EventGrammar
from dsmr_mlx.tokenizers.token_tables import fill_forward

PAD, BOS, EOS = 0, 1, 2
NOTE_ON, NOTE_OFF, TIME_SHIFT, VELOCITY = 3, 131, 259, 359  # the first id of each kind
MAX_SHIFT, VELOCITY_BINS = 100, 32
FILL, PLAY = 391, 392
VOCAB_SIZE = 393

TICKS_PER_SECOND = 100
DEFAULT_BIN = 15  # MIDI velocities 61..64, for notes without a VELOCITY before them


def token_names() -> tuple[str, ...]:
    """Return the names of all ids, in order. TIME_SHIFTs are named by their ticks, VELOCITYs by their bins."""
    return (
        "PAD",
        "BOS",
        "EOS",
        *(f"NOTE_ON_{pitch}" for pitch in range(PITCHES)),
        *(f"NOTE_OFF_{pitch}" for pitch in range(PITCHES)),
        *(f"TIME_SHIFT_{ticks}" for ticks in range(1, MAX_SHIFT + 1)),
        *(f"VELOCITY_{velocity_bin}" for velocity_bin in range(VELOCITY_BINS)),
        "FILL",
        "PLAY",
    )


def velocity_bins(velocity: np.ndarray) -> np.ndarray:
    """Convert MIDI velocities 1..127 to bins 0..31 of four each (Magenta's `velocity_to_bin`), int64."""
    return (np.clip(velocity, 1, 127).astype(np.int64) - 1) // 4


def bin_velocities(velocity_bin: np.ndarray) -> np.ndarray:
    """Convert bins 0..31 to MIDI velocities, uint8, within 2 of every velocity of the bin."""
    return (4 * velocity_bin + 2).astype(np.uint8)


def encode_notes(notes: Notes) -> np.ndarray:
    """Encode notes as their canonical stream, uint16 `(T,)` without BOS and EOS. Drums are left out.

    Times are rounded to the nearest tick, counted from the first onset (an onset moves by at most 5 ms). A note lasts
    at least one tick and ends when its key is pressed again; of several notes with one pitch and onset the longest,
    then the loudest, is kept.
    """
    notes = notes.as_piano()
    if not len(notes):
        return np.empty(0, np.uint16)
    on, off, pitch, loudness = _on_grid(notes)
    time, is_on, pitch, loudness = _events(on, off, pitch, loudness)

    wait = np.diff(time, prepend=0)
    rest = wait % MAX_SHIFT
    louder = np.zeros(len(time), bool)  # a VELOCITY comes before this event
    louder[is_on] = np.diff(loudness[is_on], prepend=-1) != 0
    # (2N,) the index of each key event: full shifts, the rest and a VELOCITY come before it.
    place = np.cumsum(wait // MAX_SHIFT + (rest > 0) + louder + 1) - 1

    ids = np.full(place[-1] + 1, TIME_SHIFT + MAX_SHIFT - 1, np.uint16)  # full shifts unless overwritten
    ids[place] = np.where(is_on, NOTE_ON, NOTE_OFF) + pitch
    ids[place[louder] - 1] = VELOCITY + loudness[louder]  # directly before its key event
    ids[(place - louder)[rest > 0] - 1] = TIME_SHIFT - 1 + rest[rest > 0]  # before the VELOCITY, if there is one
    return ids


def pause_ids(ticks: int) -> np.ndarray:
    """Return the TIME_SHIFTs of a pause, as many full seconds as fit and then the rest: uint16 `(T,)`."""
    full, rest = divmod(ticks, MAX_SHIFT)
    return np.array([TIME_SHIFT + MAX_SHIFT - 1] * full + [TIME_SHIFT + rest - 1] * (rest > 0), np.uint16)


def _on_grid(notes: Notes) -> tuple[np.ndarray, ...]:
    """Return onset, offset (ticks), pitch, velocity bin: int64 `(N,)`, sorted by (pitch, onset), without overlaps."""
    start = notes.onset.min()
    on = np.rint((notes.onset - start) * TICKS_PER_SECOND).astype(np.int64)
    off = np.rint((notes.offset - start) * TICKS_PER_SECOND).astype(np.int64)
    return cut_overlaps(on, off, notes.pitch.astype(np.int64), velocity_bins(notes.velocity), 1)


def _events(on, off, pitch, loudness) -> tuple[np.ndarray, ...]:
    """Return time, "is a NOTE_ON", pitch, velocity bin (NOTE_OFF: 0) of the 2N key events in canonical order.

    Each event is packed into one integer that sorts canonically: several times as fast as sorting by four keys.
    """
    event = np.concatenate([off * 2, on * 2 + 1]) * PITCHES + np.concatenate([pitch, pitch])
    event *= VELOCITY_BINS
    event[len(on) :] += loudness
    event.sort()
    key = event // VELOCITY_BINS
    time = key // (2 * PITCHES)
    return time, (key // PITCHES % 2).astype(bool), key % PITCHES, event % VELOCITY_BINS


def decode_ids(ids) -> Notes:
    """Decode any integers, canonical or not, to notes. Never raises for integers of any value or shape.

    ids: array-like of integers, flattened. Special ids, ids outside the vocabulary, shown ids (see
    `base.shown_mask`), and the NOTE_OFF of a silent key are ignored. A NOTE_ON of a sounding key ends its note and
    presses it again; of several presses in one tick the last is kept. A key that sounds at the end is released there. A
    note lasts at least one tick. Times are multiples of 10 ms; time before the first note is kept.
    """
    ids = np.asarray(ids).ravel()
    ids = ids[~shown_mask(ids, FILL, PLAY) & (ids >= NOTE_ON) & (ids < FILL)].astype(np.int64)
    if not (ids < NOTE_OFF).any():
        return Notes.empty()
    grammar = performance_grammar()
    time = np.cumsum(grammar.ticks[ids], dtype=np.int64)
    # The bin in force at each id; the prepended default holds until the first VELOCITY.
    loudness = np.append(DEFAULT_BIN, grammar.velocity[ids])
    loudness = fill_forward(loudness, loudness >= 0)[1:]

    keys = np.flatnonzero(ids < TIME_SHIFT)
    pitch = (ids[keys] - NOTE_ON) % PITCHES
    order = np.argsort(pitch.astype(np.uint8), kind="stable")
    keys, pitch = keys[order], pitch[order]  # the key events of each pitch, in order of time
    again = np.append(pitch[1:] == pitch[:-1], False)
    end = np.append(time[keys][1:], 0)  # a note ends at the next event of its pitch, whichever it is
    end = np.where(again, end, time[-1])

    press = ids[keys] < NOTE_OFF
    keys, pitch, on, end = keys[press], pitch[press], time[keys][press], end[press]
    # True at the last press of a key in a tick.
    last = np.append((pitch[1:] != pitch[:-1]) | (on[1:] != on[:-1]), True)
    keys, pitch, on, end = keys[last], pitch[last], on[last], np.maximum(end, on + 1)[last]
    velocity = bin_velocities(loudness[keys])
    return Notes.sorted(on / TICKS_PER_SECOND, end / TICKS_PER_SECOND, pitch, velocity)


START, ON, OFF, SHIFT, FULL_SHIFT, AFTER_VELOCITY, END = range(7)  # the states: kinds of the last id


@cache
def performance_grammar() -> EventGrammar:
    """Return the grammar of canonical streams: EOS only after a NOTE_OFF; PAD, BOS, FILL and PLAY never.

    Leave out the shown ids, which are not part of the stream: the state after PLAY is the one before FILL.
    """
    ids = np.arange(VOCAB_SIZE, dtype=np.int32)
    on, off = (ids >= NOTE_ON) & (ids < NOTE_OFF), (ids >= NOTE_OFF) & (ids < TIME_SHIFT)
    shift, velocity = (ids >= TIME_SHIFT) & (ids < VELOCITY), (ids >= VELOCITY) & (ids < FILL)
    full, eos = ids == VELOCITY - 1, ids == EOS
    allowed = np.stack(
        [
            velocity,  # START
            on | velocity | shift,  # ON: NOTE_OFFs come before NOTE_ONs
            on | off | velocity | shift | eos,  # OFF
            on | off | velocity,  # SHIFT: only one rest, after full seconds
            on | off | velocity | shift,  # FULL_SHIFT
            on,  # AFTER_VELOCITY
            np.zeros_like(on),  # END
        ]
    )
    next_state = np.select(
        [ids == BOS, on, off, full, shift, velocity], [START, ON, OFF, FULL_SHIFT, SHIFT, AFTER_VELOCITY], END
    )
    unknown = np.full(VOCAB_SIZE, -1, np.int32)
    grammar = EventGrammar(
        allowed=allowed,
        next_state=np.broadcast_to(next_state.astype(np.int32), allowed.shape),
        press=np.where(on, ids - NOTE_ON, -1).astype(np.int32),
        release=np.where(off, ids - NOTE_OFF, -1).astype(np.int32),
        duration=unknown,
        velocity=np.where(velocity, ids - VELOCITY, -1).astype(np.int32),
        ticks=np.where(shift, ids - TIME_SHIFT + 1, 0).astype(np.int32),
        bar=np.zeros(VOCAB_SIZE, bool),
        position=unknown,
        velocities=bin_velocities(np.arange(VELOCITY_BINS)),
        start=START,
        seconds_per_tick=1 / TICKS_PER_SECOND,
        states=("START", "NOTE_ON", "NOTE_OFF", "TIME_SHIFT", "TIME_SHIFT_100", "VELOCITY", "END"),
    )
    for table in vars(grammar).values():
        if isinstance(table, np.ndarray):
            table.flags.writeable = False  # the cached object is shared
    return grammar


class PerformanceTokenizer(Tokenizer):
    """The performance events of Oore et al. 2018, see `dsmr_mlx.tokenizers.performance`: 388 events, 5 special ids."""

    kind = "performance"
    version = 2
    earlier_versions: ClassVar = {"0fd0f17940791a81a16692e7e873d85abbd0a8e905f0742ab9778f61c84e3f1a": 1}  # no FILL
    tokens = token_names()
    pad_id = PAD
    bos_id = BOS
    eos_id = EOS
    fill_id = FILL
    play_id = PLAY

    def encode_notes(self, notes: Notes) -> np.ndarray:
        """Encode notes as BOS, the canonical stream, EOS: uint16 `(T,)`."""
        ids = encode_notes(notes)
        return np.concatenate([[self.bos_id], ids, [self.eos_id]]).astype(self.dtype)

    def recovered(self, notes: Notes, ids: np.ndarray) -> tuple[int, float]:
        """See `Tokenizer.recovered`. Counted in the canonical stream, much faster than decoding."""
        grammar, ids = performance_grammar(), self.without_shown(ids)
        return int((grammar.press[ids] >= 0).sum()), float(grammar.ticks[ids].sum() / TICKS_PER_SECOND)

    def decode(self, ids) -> Notes:
        """See `decode_ids`."""
        return decode_ids(ids)

    def event_grammar(self) -> EventGrammar:
        """See `performance_grammar`."""
        return performance_grammar()
