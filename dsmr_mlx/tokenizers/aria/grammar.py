"""The grammar of Aria's events, for one piano.

A note is three events: pitch with velocity, onset, length. The pedal is two: down or up, and when. Onsets lie within a
segment of five seconds and never before the last one; a time step begins the next segment.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from dsmr_mlx.tokenizers.aria.encoding import STEPS_PER_SECOND
from dsmr_mlx.tokenizers.aria.vocabulary import (
    ENDING,
    EOS,
    ONSETS,
    STEP_MS,
    TIME_STEP,
    UNKNOWN,
    VELOCITIES,
    vocabulary_of,
)
from dsmr_mlx.tokenizers.event_grammar import EventGrammar

MAX_TIME_STEPS = 12  # in a row: a minute, longer than the pauses of recordings
# States by what comes next: any event (at the start, or later), the onset of a note, its length, the onset of a pedal
# that goes down, or up; then any event after 1, 2, … time steps.
START, FREE, NOTE, LENGTH, DOWN, UP = range(6)
PLACES = 6 + MAX_TIME_STEPS
NAMES = ("START", "FREE", "NOTE", "LENGTH", "PEDAL_DOWN", "PEDAL_UP", *(f"T{i + 1}" for i in range(MAX_TIME_STEPS)))


@cache
def aria_grammar(size: int) -> EventGrammar:
    """Return the grammar of the vocabulary with `size` ids.

    A state is a place in an event, whether the pedal is down, and whether the end has been announced. The piece ends
    after a complete event. At most `MAX_TIME_STEPS` time steps follow one another.
    """
    v, ids = vocabulary_of(size), np.arange(size)
    instrument, pitch, velocity = v.note_fields(ids)
    onset, duration, pedal = (v.index(block, ids) for block in ("onsets", "durations", "pedal"))
    note = (instrument == 0) & (velocity > 0)
    drum = (v.index("drums", ids) >= 0) | (ids == UNKNOWN)
    kinds = [instrument >= 0, onset >= 0, duration >= 0, pedal == 0, pedal == 1, drum, ids == TIME_STEP]
    announces = (ids == ENDING) & (v.prompt_end is None)  # the weights with <X> were trained without endings
    endings, pedals = (0, 1) if announces.any() else (0,), (0, 1) if v.pedal else (0,)
    states = [(place, down, ending) for ending in endings for down in pedals for place in range(PLACES)]
    number = {state: i for i, state in enumerate(states)}
    end = len(states)
    allowed = np.zeros((end + 1, size), bool)
    next_state = np.repeat(np.arange(end + 1, dtype=np.int32)[:, None], size, axis=1)
    for state, (place, down, ending) in enumerate(states):
        between, steps = place in (START, FREE) or place >= PLACES - MAX_TIME_STEPS, max(place - UP, 0)
        for kind, target in zip(kinds, _targets(place, down, steps, v.pedal is not None), strict=True):
            next_state[state, kind] = number[(*target, ending)]
        allowed[state] = (
            (note & between)
            | (kinds[1] & (place in (NOTE, DOWN, UP)))
            | ((duration > 0) & (place == LENGTH))
            | ((pedal == down) & between)
            | (kinds[-1] & between & (steps < MAX_TIME_STEPS))
            | (announces & between & (not ending))
            | ((ids == EOS) & (place == FREE))
        )
        next_state[state, announces], next_state[state, EOS] = number[place, down, endings[-1]], end
    next_state[end] = next_state[0]
    unknown, none = np.full(size, -1, np.int32), np.zeros(size, np.int32)
    return EventGrammar(
        allowed=allowed,
        next_state=next_state,
        press=np.where(note, pitch, -1).astype(np.int32),
        release=unknown,
        duration=duration.astype(np.int32),
        velocity=np.where(note, velocity - 1, -1).astype(np.int32),
        ticks=none,
        bar=ids == TIME_STEP,
        position=onset.astype(np.int32),
        velocities=(STEP_MS * np.arange(1, VELOCITIES)).astype(np.uint8),
        start=number[START, 0, 0],
        seconds_per_tick=1 / STEPS_PER_SECOND,
        states=(*("_".join([NAMES[p], *["down"] * d, *["ending"] * e]) for p, d, e in states), "END"),
        held=False,
        running_velocity=False,
        bar_ticks=ONSETS,
        pedal=np.append([bool(down) for _, down, _ in states], False),
        announces=announces,
    )


def _targets(place: int, down: int, steps: int, has_pedal: bool) -> list[tuple[int, int]]:
    """Return (place, pedal down) after an id of each kind, in the order of `kinds`.

    steps: time steps in a row so far
    """
    after_onset = {NOTE: (LENGTH, down), DOWN: (FREE, int(has_pedal)), UP: (FREE, 0)}.get(place, (FREE, down))
    return [
        (NOTE, down),
        after_onset,
        (FREE, down),
        (DOWN, down),
        (UP, down),
        (DOWN if down else UP, down),
        (UP + min(steps + 1, MAX_TIME_STEPS), down),
    ]
