"""Count the syntax errors in a stream of ids."""

import numpy as np

from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import EventGrammar, states_after
from dsmr_mlx.tokenizers.token_tables import token_tables


def syntax_errors(ids: np.ndarray, tokenizer: Tokenizer) -> tuple[int, str] | None:
    """Count the syntax errors in ids `(T,)` by the tokenizer's grammar, and describe the first ("" without errors).

    Errors are: an id outside the vocabulary; an event that may not follow the previous one, or that goes back in time;
    pressing a key that sounds, or releasing one that does not; a velocity equal to the current one; at the end, each
    key that still sounds, and an event that may not be the last. A BOS at the start and an EOS at the end are optional.
    What is shown, from FILL to PLAY, is left out; a FILL or PLAY without its counterpart is an error.

    Returns None if the grammar of the vocabulary is unknown.
    """
    g = tokenizer.event_grammar()
    if g is None:
        return None
    ids = np.asarray(ids).ravel()
    unknown, shown = (ids < 0) | (ids >= tokenizer.vocab_size), tokenizer.shown_mask(ids)
    known = ~unknown & ~shown
    place, inside = np.flatnonzero(known), ids[known].astype(np.int64)
    begins = int(len(inside) > 0 and inside[0] == tokenizer.bos_id)
    rows = token_tables(tokenizer).events[inside[begins:]]
    music, place_of_music = rows[rows >= 0].astype(np.int64), np.repeat(place[begins:], (rows >= 0).sum(axis=1))
    before = states_after(g.next_state, g.start, music)
    wrong = ~g.allowed[before[:-1], music] | goes_back(g, music)
    errors = [np.flatnonzero(unknown), unpaired(ids, tokenizer), place_of_music[wrong]]
    held = 0
    if g.held:
        keys, held = key_errors(g.press[music], g.release[music])
        errors.append(place_of_music[keys])
    if g.running_velocity:
        velocities = np.flatnonzero(g.velocity[music] >= 0)
        errors.append(place_of_music[velocities[1:][np.diff(g.velocity[music][velocities]) == 0]])
    ending = g.ends & g.allowed.any(axis=0)
    may_end = g.allowed[before[-1], ending].any() or g.ends[music[-1:]].any() or not ending.any()
    errors.append(np.full(held + (len(music) > 0 and not may_end), len(ids)))
    indices = np.sort(np.concatenate(errors))
    return len(indices), describe_token(int(indices[0]), ids, tokenizer) if len(indices) else ""


def unpaired(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return the indices of each FILL after an open FILL and each PLAY without one, and the end if a FILL is open."""
    marks = np.flatnonzero(np.isin(ids, [tokenizer.fill_id, tokenizer.play_id]))
    fills = np.append(ids[marks] == tokenizer.fill_id, True)  # the end counts as a FILL: an error if one is open
    return np.append(marks, len(ids))[fills == np.append(False, fills[:-1])]


def goes_back(g: EventGrammar, events: np.ndarray) -> np.ndarray:
    """Return a mask `(T,)` of the events that name a position in the bar which has already passed."""
    phases = g.first_phase + g.elapsed(events) - np.cumsum(g.bar[events]) * g.bar_ticks
    before = np.append(g.first_phase, phases)[: len(events)]
    return (g.position[events] >= 0) & (g.position[events] < before)


def key_errors(press: np.ndarray, release: np.ndarray) -> tuple[np.ndarray, int]:
    """Return where a sounding key is pressed or a silent one released, and how many keys sound at the end.

    press, release: the pitch `(T,)` that each event presses or releases, −1 for none.
    """
    events = np.flatnonzero((press >= 0) | (release >= 0))
    pitch = np.maximum(press, release)[events]
    order = np.argsort(pitch, kind="stable")  # by key, each in the order of time
    events, pitch = events[order], pitch[order]
    down = press[events] >= 0
    same = pitch[1:] == pitch[:-1]
    sounds = np.append(False, down[:-1] & same)[: len(events)]
    last = np.append(~same, True)[: len(events)]
    return events[sounds == down], int((down & last).sum())


def describe_token(index: int, ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """Return the token at an index of the ids, and the index, as text."""
    if index == len(ids):
        return "at the end"
    i = int(ids[index])
    name = tokenizer.tokens[i] if 0 <= i < tokenizer.vocab_size else f"id {i}"
    return f"{name} at index {index}"
