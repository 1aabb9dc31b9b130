"""An independent checker of performance streams, on whole arrays."""

import numpy as np

from dsmr_mlx.music.notes import PITCHES
from dsmr_mlx.tokenizers.performance import (
    BOS,
    EOS,
    FILL,
    NOTE_OFF,
    NOTE_ON,
    OFF,
    START,
    TIME_SHIFT,
    VELOCITY,
    VOCAB_SIZE,
    performance_grammar,
    token_names,
)


def first_violation(ids, *, complete: bool = True) -> tuple[int, str] | None:
    """Return where a stream first breaks the grammar, and how: (index, reason), or None.

    ids: `(T,)` integers; BOS at the start and EOS at the end are optional. The order by pitch at one time is not part
    of the grammar and not checked. complete: the stream must end with a NOTE_OFF, with all keys up.
    """
    ids = np.asarray(ids).ravel()
    outside = np.flatnonzero((ids < 0) | (ids >= VOCAB_SIZE))
    end = int(outside[0]) if len(outside) else len(ids)
    known = ids[:end].astype(np.int64)
    faults = [_order_fault(known), _key_fault(known), _velocity_fault(known)]
    if len(outside):
        faults.append((end, f"id {ids[end]}, expected 0..{VOCAB_SIZE - 1}"))
    elif complete:
        ends = np.flatnonzero(known == EOS)
        faults.append(_end_fault(known[: ends[0] + 1] if len(ends) else known))
    return min((fault for fault in faults if fault), default=None)


def _order_fault(ids: np.ndarray) -> tuple[int, str] | None:
    """Return the first id that may not follow the one before it."""
    grammar, names = performance_grammar(), token_names()
    first = int(len(ids) > 0 and ids[0] == BOS)
    state = np.append(grammar.start, grammar.next_state[0, ids[first:-1]])[: len(ids) - first]
    bad = np.flatnonzero(~grammar.allowed[state, ids[first:]])
    if not len(bad):
        return None
    return int(bad[0]) + first, f"{names[ids[bad[0] + first]]} may not follow {grammar.states[state[bad[0]]]}"


def _key_fault(ids: np.ndarray) -> tuple[int, str] | None:
    """Return the first NOTE_ON of a sounding key or NOTE_OFF of a silent one: both must alternate for each pitch."""
    keys = np.flatnonzero((ids >= NOTE_ON) & (ids < TIME_SHIFT))
    pitch = ((ids[keys] - NOTE_ON) % PITCHES).astype(np.uint8)
    order = np.argsort(pitch, kind="stable")
    keys, pitch = keys[order], pitch[order]
    is_on = ids[keys] < NOTE_OFF
    sounds = np.append(False, is_on[:-1] & (pitch[1:] == pitch[:-1]))[: len(keys)]
    bad = keys[sounds == is_on]
    if not len(bad):
        return None
    index = int(bad.min())
    reason = "presses a sounding key" if ids[index] < NOTE_OFF else "releases a silent key"
    return index, f"{token_names()[ids[index]]} {reason}"


def _velocity_fault(ids: np.ndarray) -> tuple[int, str] | None:
    """Return the first VELOCITY that repeats the running one."""
    where = np.flatnonzero((ids >= VELOCITY) & (ids < FILL))
    bad = np.flatnonzero(ids[where[1:]] == ids[where[:-1]])
    if not len(bad):
        return None
    index = int(where[bad[0] + 1])
    return index, f"{token_names()[ids[index]]} repeats the running velocity"


def _end_fault(ids: np.ndarray) -> tuple[int, str] | None:
    """Return what is missing at the end of a stream."""
    grammar = performance_grammar()
    end = len(ids) - int(len(ids) > 0 and ids[-1] == EOS)
    pressed = np.bincount(grammar.press[ids] + 1, minlength=PITCHES + 1)[1:]
    released = np.bincount(grammar.release[ids] + 1, minlength=PITCHES + 1)[1:]
    held = np.flatnonzero(pressed > released)
    if len(held):
        return end, f"the stream ends while key {held[0]} sounds"
    if end and grammar.next_state[0, ids[end - 1]] not in (OFF, START):
        return end, "the stream does not end with a NOTE_OFF"
    return None
