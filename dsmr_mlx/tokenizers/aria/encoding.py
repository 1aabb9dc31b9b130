"""Music in milliseconds ⇄ Aria's ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsmr_mlx.music.notes import DRUMS, Notes, without_overlaps
from dsmr_mlx.tokenizers.aria.grids import duration_steps, onset_steps, velocity_steps
from dsmr_mlx.tokenizers.aria.vocabulary import (
    HIGHEST_DRUM,
    LOWEST_DRUM,
    NOTES,
    ONSETS,
    PROGRAM_OF_INSTRUMENT,
    SEGMENT_MS,
    STEP_MS,
    TIME_STEP,
    UNKNOWN,
    VELOCITIES,
    AriaVocabulary,
)

DRUM_VELOCITY = 60
STEPS_PER_SECOND = 1000 // STEP_MS


@dataclass(frozen=True)
class TimedMusic:
    """Notes in the order of their ids, and the pedal. Times are milliseconds from the beginning, int64.

    onset, duration, pitch, velocity, instrument: `(N,)`, instrument −1 for drums
    pedal_time, pedal_down: `(P,)`, when the pedal goes down or up, bool
    """

    onset: np.ndarray
    duration: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray
    instrument: np.ndarray
    pedal_time: np.ndarray
    pedal_down: np.ndarray


def encode_events(music: TimedMusic, vocabulary: AriaVocabulary) -> np.ndarray:
    """Return the ids of the events, uint16 `(T,)`. At one time the pedal comes before notes."""
    v, n_pedals = vocabulary, len(music.pedal_time)
    is_drum = music.instrument < 0
    drum = np.where((music.pitch < LOWEST_DRUM) | (music.pitch > HIGHEST_DRUM), -1, music.pitch - LOWEST_DRUM)
    struck = np.where(drum >= 0, (v.drums or 0) + drum, UNKNOWN)
    played = v.notes + music.instrument * NOTES + music.pitch * VELOCITIES + velocity_steps(music.velocity)
    pedal = (v.pedal or 0) + ~music.pedal_down
    first = np.concatenate([pedal, np.where(is_drum, struck, played)]).astype(np.int64)
    time = np.concatenate([music.pedal_time, music.onset])
    length = np.concatenate([np.full(n_pedals, 2), np.where(is_drum, 2, 3)])
    last = v.durations + np.concatenate([np.zeros(n_pedals, np.int64), duration_steps(music.duration)])
    order = np.argsort(time, kind="stable")
    first, time, length, last = first[order], time[order], length[order], last[order]
    segment = time // SEGMENT_MS
    end = np.cumsum(np.diff(segment, prepend=0) + length)
    ids = np.full(end[-1] if len(end) else 0, TIME_STEP, np.uint16)
    ids[end - length] = first
    ids[end - length + 1] = v.onsets + onset_steps(time % SEGMENT_MS)
    ids[end[length == 3] - 1] = last[length == 3]
    return ids


def decode_events(ids: np.ndarray, vocabulary: AriaVocabulary, programs: bool) -> Notes:
    """Decode any integers `(T,)`. What is not a complete event is skipped.

    A note that ends while the pedal is down lasts until the pedal goes up, and every note ends when its pitch is played
    again. A pedal that never goes up holds notes until the last event. programs: the notes have programs and drums;
    if not, only notes of the piano are returned.
    """
    v, ids = vocabulary, np.asarray(ids).ravel().astype(np.int64)
    following = np.append(ids[1:], [-1, -1, -1])
    onset = v.index("onsets", following[: len(ids)])
    duration = v.index("durations", following[1 : len(ids) + 1])
    time = np.cumsum(ids == TIME_STEP) * ONSETS + onset  # in steps, where an onset follows
    instrument, pitch, velocity = v.note_fields(ids)
    timed = onset >= 0
    note = np.flatnonzero((instrument >= 0) & (velocity > 0) & timed & (duration >= 0))
    if not programs:
        note = note[instrument[note] == 0]
    begin, end = time[note], time[note] + np.maximum(duration[note], 1)
    last = max(int((ids == TIME_STEP).sum()) * ONSETS, int(time[timed].max(initial=0)))
    pedal = np.flatnonzero((v.index("pedal", ids) >= 0) & timed)
    end = held_by_pedal(end, time[pedal], v.index("pedal", ids)[pedal] == 0, last)
    velocity = np.minimum(STEP_MS * velocity[note], 127)
    if not programs:
        return without_overlaps(begin / STEPS_PER_SECOND, end / STEPS_PER_SECOND, pitch[note], velocity)
    drum_place = v.index("drums", ids)
    drum = np.flatnonzero((drum_place >= 0) & timed)
    program = np.append(np.array(PROGRAM_OF_INSTRUMENT)[instrument[note]], np.full(len(drum), DRUMS))
    columns = (
        np.append(begin, time[drum]) / STEPS_PER_SECOND,
        np.append(end, time[drum] + 1) / STEPS_PER_SECOND,
        np.append(pitch[note], drum_place[drum] + LOWEST_DRUM),
        np.append(velocity, np.full(len(drum), DRUM_VELOCITY)),
    )
    return without_overlaps(*columns, program)


def held_by_pedal(end: np.ndarray, time: np.ndarray, down: np.ndarray, last: int) -> np.ndarray:
    """Return the ends `(N,)` of notes with a pedal that goes down or up at times `(P,)`; they last at most to `last`
    if it never goes up.
    """
    order = np.argsort(time, kind="stable")
    time, down = time[order], down[order]
    changes = down != np.append(False, down[:-1])[: len(down)]
    time, down = time[changes], down[changes]  # down and up in turn
    begins, ends = time[down], time[~down]
    ends = np.append(ends, [last] * (len(begins) - len(ends)))
    place = np.searchsorted(begins, end, side="left") - 1  # the last interval that begins before the end
    held = place >= 0
    return np.where(held, np.maximum(end, np.append(ends, 0)[place]), end)
