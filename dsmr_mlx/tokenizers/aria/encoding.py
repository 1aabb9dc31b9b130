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
    """Decode any integers `(T,)`. Incomplete events are skipped.

    A note that ends while the pedal is down lasts until the pedal goes up, and every note ends when its pitch is played
    again. A pedal that never goes up holds notes until the last event. programs: the notes have programs and drums;
    if not, only notes of the piano are returned.
    """
    music, last = parse_events(ids, vocabulary)
    is_drum = music.instrument < 0
    ends = music.onset + np.maximum(music.duration, STEP_MS)
    ends = np.where(is_drum, ends, held_by_pedal(ends, music.pedal_time, music.pedal_down, last))
    kept = np.full(len(ends), True) if programs else music.instrument == 0
    begin, end = music.onset[kept] // STEP_MS / STEPS_PER_SECOND, ends[kept] // STEP_MS / STEPS_PER_SECOND
    pitch, velocity = music.pitch[kept], music.velocity[kept]
    program = np.where(is_drum, DRUMS, np.array(PROGRAM_OF_INSTRUMENT)[music.instrument])
    return without_overlaps(begin, end, pitch, velocity, program[kept] if programs else None)


def parse_events(ids: np.ndarray, vocabulary: AriaVocabulary) -> tuple[TimedMusic, int]:
    """Return the music of any integers `(T,)` as written, and the time of the last event in milliseconds.

    Incomplete events are skipped. Drums last `STEP_MS`.
    """
    v, ids = vocabulary, np.asarray(ids).ravel().astype(np.int64)
    following = np.append(ids[1:], [-1, -1, -1])
    onset = v.index("onsets", following[: len(ids)])
    duration = v.index("durations", following[1 : len(ids) + 1])
    time = STEP_MS * (np.cumsum(ids == TIME_STEP) * ONSETS + onset)  # where an onset follows
    instrument, pitch, velocity = v.note_fields(ids)
    drum, pedal, timed = v.index("drums", ids), v.index("pedal", ids), onset >= 0
    note = np.flatnonzero(timed & ((drum >= 0) | ((instrument >= 0) & (velocity > 0) & (duration >= 0))))
    is_drum, moves = drum[note] >= 0, np.flatnonzero(timed & (pedal >= 0))
    music = TimedMusic(
        onset=time[note],
        duration=np.where(is_drum, STEP_MS, STEP_MS * duration[note]),
        pitch=np.where(is_drum, drum[note] + LOWEST_DRUM, pitch[note]),
        velocity=np.where(is_drum, DRUM_VELOCITY, STEP_MS * velocity[note]),
        instrument=instrument[note],
        pedal_time=time[moves],
        pedal_down=pedal[moves] == 0,
    )
    return music, max(int((ids == TIME_STEP).sum()) * SEGMENT_MS, int(time[timed].max(initial=0)))


def held_by_pedal(end: np.ndarray, time: np.ndarray, down: np.ndarray, last: int) -> np.ndarray:
    """Return the ends `(N,)` of notes with a pedal that goes down or up at times `(P,)`. A pedal that never goes up
    holds notes until `last`.
    """
    order = np.argsort(time, kind="stable")
    time, down = time[order], down[order]
    changes = down != np.append(False, down[:-1])[: len(down)]
    time, down = time[changes], down[changes]  # down and up alternate
    begins, ends = time[down], time[~down]
    ends = np.append(ends, [last] * (len(begins) - len(ends)))
    place = np.searchsorted(begins, end, side="left") - 1  # the last interval that begins before the end
    held = place >= 0
    return np.where(held, np.maximum(end, np.append(ends, 0)[place]), end)
