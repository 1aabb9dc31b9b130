"""Faults of a stream of ids: how many there are, and the first."""

import numpy as np

from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import EventGrammar
from dsmr_mlx.tokenizers.token_tables import token_tables


def syntax_errors(ids: np.ndarray, tokenizer: Tokenizer) -> tuple[int, str] | None:
    """How many faults ids `[T]` have by the tokenizer's grammar, and in words where the first is, "" if none.

    Counted are, event by event: an id outside the vocabulary; an event that may not follow the one before it, or that
    goes back in time; a key that is pressed while it sounds, or released while it does not; a velocity that is in force
    already; and at the end each key that still sounds, and an end that may not be there. A BOS at the start and an EOS
    at the end are optional. None if the vocabulary has no known grammar. There is no fault if and only if
    `event_grammar.first_violation`, or `performance.first_violation`, sees none.
    """
    g = tokenizer.event_grammar()
    if g is None:
        return None
    ids = np.asarray(ids).ravel()
    known = (ids >= 0) & (ids < tokenizer.vocab_size)
    place, inside = np.flatnonzero(known), ids[known].astype(np.int64)
    begins = int(len(inside) > 0 and inside[0] == tokenizer.bos_id)
    rows = token_tables(tokenizer).events[inside[begins:]]
    music, place_of_music = rows[rows >= 0].astype(np.int64), np.repeat(place[begins:], (rows >= 0).sum(axis=1))
    before = np.append(g.start, g.next_state[music])
    faults = [np.flatnonzero(~known), place_of_music[~g.allowed[before[:-1], music] | goes_back(g, music)]]
    held = 0
    if g.held:
        keys, held = key_faults(g.press[music], g.release[music])
        faults.append(place_of_music[keys])
    if g.running_velocity:
        velocities = np.flatnonzero(g.velocity[music] >= 0)
        faults.append(place_of_music[velocities[1:][np.diff(g.velocity[music][velocities]) == 0]])
    ending = g.ends & g.allowed.any(axis=0)
    may_end = g.allowed[before[-1], ending].any() or g.ends[music[-1:]].any() or not ending.any()
    faults.append(np.full(held + (len(music) > 0 and not may_end), len(ids)))
    every = np.sort(np.concatenate(faults))
    return len(every), described(int(every[0]), ids, tokenizer) if len(every) else ""


def goes_back(g: EventGrammar, events: np.ndarray) -> np.ndarray:
    """(T,) bool: the events of a piece that name a place in the bar which is over."""
    phases = g.first_phase + g.elapsed(events) - np.cumsum(g.bar[events]) * g.bar_ticks
    before = np.append(g.first_phase, phases)[: len(events)]
    return (g.position[events] >= 0) & (g.position[events] < before)


def key_faults(press: np.ndarray, release: np.ndarray) -> tuple[np.ndarray, int]:
    """Where a sounding key is pressed or a silent one released, and how many keys sound at the end; of pitches `[T]`
    that are pressed and released, or −1."""
    events = np.flatnonzero((press >= 0) | (release >= 0))
    pitch = np.maximum(press, release)[events]
    order = np.argsort(pitch, kind="stable")
    events, pitch = events[order], pitch[order]
    down = press[events] >= 0
    same = pitch[1:] == pitch[:-1]
    sounds = np.append(False, down[:-1] & same)[: len(events)]
    last = np.append(~same, True)[: len(events)]
    return events[sounds == down], int((down & last).sum())


def described(index: int, ids: np.ndarray, tokenizer: Tokenizer) -> str:
    if index == len(ids):
        return "at the end"
    i = int(ids[index])
    name = tokenizer.tokens[i] if 0 <= i < tokenizer.vocab_size else f"id {i}"
    return f"{name} at index {index}"
