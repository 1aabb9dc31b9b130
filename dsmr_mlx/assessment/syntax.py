"""Faults of a stream of ids: how many there are, and the first."""

import numpy as np

from dsmr_mlx.tokenizer import Tokenizer


def syntax_errors(ids: np.ndarray, tokenizer: Tokenizer) -> tuple[int, str] | None:
    """How many faults ids `[T]` have by the tokenizer's grammar, and in words where the first is, "" if none.

    Counted are: an id outside the vocabulary; an id that may not follow the one before it; a key that is pressed
    while it sounds, or released while it does not; a velocity that is in force already; and at the end each key
    that still sounds, and an end that may not be there. A BOS at the start and an EOS at the end are optional. None
    if the vocabulary has no known grammar. There is no fault if and only if `performance.first_violation` sees none.
    """
    g = tokenizer.grammar()
    if g is None:
        return None
    ids = np.asarray(ids).ravel()
    known = (ids >= 0) & (ids < tokenizer.vocab_size)
    place, inside = np.flatnonzero(known), ids[known].astype(np.int64)
    begins = int(len(inside) > 0 and inside[0] == tokenizer.bos_id)
    music, place_of_music = inside[begins:], place[begins:]
    before = np.append(g.start, g.next_state[music])
    faults = [np.flatnonzero(~known), place_of_music[~g.allowed[before[:-1], music]]]
    keys, held = key_faults(g.press[music], g.release[music])
    velocities = np.flatnonzero(g.velocity[music] >= 0)
    repeated = velocities[1:][np.diff(g.velocity[music][velocities]) == 0]
    faults += [place_of_music[keys], place_of_music[repeated], np.full(held, len(ids))]
    ended = len(music) > 0 and music[-1] == tokenizer.eos_id
    if len(music) and not ended and tokenizer.eos_id is not None and not g.allowed[before[-1], tokenizer.eos_id]:
        faults.append(np.array([len(ids)]))
    every = np.sort(np.concatenate(faults))
    return len(every), described(int(every[0]), ids, tokenizer) if len(every) else ""


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
