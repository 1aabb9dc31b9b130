"""The grammar of any vocabulary as a walk in NumPy, one event at a time: the reference for the fast tables."""

from collections.abc import Iterable

import numpy as np

from dsmr_mlx.tokenizers.event_grammar import EventGrammar, Moment, beginning
from dsmr_mlx.tokenizers.token_tables import UNCHANGED, TokenTables


def may_follow(grammar: EventGrammar, moment: Moment, event: int) -> bool:
    """Return whether an event may come now.

    Its type may follow, a key that it presses is up and one that it releases is down, a running velocity differs from
    the one before and some key is up for it, time does not go back, and all keys are up at the end of the piece.
    """
    if not grammar.allowed[moment.state, event] or (grammar.ends[event] and moment.sounding.any()):
        return False
    press, release, velocity = grammar.press[event], grammar.release[event], grammar.velocity[event]
    if grammar.held and press >= 0 and moment.sounding[press]:
        return False
    if grammar.held and release >= 0 and not moment.sounding[release]:
        return False
    if grammar.running_velocity and velocity >= 0 and (velocity == moment.velocity or moment.sounding.all()):
        return False
    return not 0 <= grammar.position[event] < moment.phase


def after(grammar: EventGrammar, moment: Moment, event: int) -> Moment:
    """Return the moment after an event, allowed or not."""
    sounding = moment.sounding
    if grammar.held and (key := max(grammar.press[event], grammar.release[event])) >= 0:
        sounding = sounding.copy()
        sounding[key] = grammar.press[event] >= 0
    velocity = moment.velocity if grammar.velocity[event] < 0 else int(grammar.velocity[event])
    pending = int(grammar.press[event]) if grammar.press[event] >= 0 else moment.pending_pitch
    pending = -1 if grammar.begins[event] else pending
    if grammar.bar[event]:
        passed, phase = grammar.bar_ticks - moment.phase, 0
    elif grammar.position[event] >= 0:
        phase = int(grammar.position[event])
        passed = phase - moment.phase
    else:
        passed = int(grammar.ticks[event])
        phase = moment.phase + passed
    return Moment(
        int(grammar.next_state[moment.state, event]), sounding, velocity, pending, phase, moment.ticks + passed
    )


def all_may_follow(grammar: EventGrammar, moment: Moment, events: Iterable[int]) -> bool:
    """Return whether events may come now, one after the other, as for a token; False for no events."""
    any_event = False
    for event in events:
        if not may_follow(grammar, moment, event):
            return False
        moment, any_event = after(grammar, moment, event), True
    return any_event


def all_after(grammar: EventGrammar, moment: Moment, events: Iterable[int]) -> Moment:
    """Return the moment after several events."""
    for event in events:
        moment = after(grammar, moment, event)
    return moment


def first_violation(grammar: EventGrammar, events: Iterable[int]) -> int | None:
    """Return the index of the first event of a piece, given without BOS, that breaks the grammar, or None."""
    moment = beginning(grammar)
    for i, event in enumerate(events):
        if not may_follow(grammar, moment, event):
            return i
        moment = after(grammar, moment, event)
    return None


def tokens_that_may_follow(tables: TokenTables, moment: Moment) -> np.ndarray:
    """Return the tokens that may come now, bool `(V,)`."""
    sounding = moment.sounding
    keys_fit = ~(tables.silent & sounding).any(axis=1) & ~(tables.sounding & ~sounding).any(axis=1)
    after = (sounding | tables.pressed) & ~tables.released
    new_velocity = (tables.first_velocity < 0) | (tables.first_velocity != moment.velocity)
    usable = ~tables.ends_in_velocity | ~after.all(axis=1)
    in_time = tables.max_phase >= moment.phase
    quiet = ~tables.ends | ~after.any(axis=1)
    return tables.allowed[moment.state] & keys_fit & new_velocity & usable & in_time & quiet


def after_token(tables: TokenTables, moment: Moment, token: int) -> Moment:
    """Return the moment after a token that may come."""
    relative, unchanged = tables.phase[token] < 0, tables.pending_pitch[token] == UNCHANGED
    passed = int(tables.ticks[token]) + (0 if relative else int(tables.phase[token]) - moment.phase)
    return Moment(
        state=int(tables.next_state[moment.state, token]),
        sounding=(moment.sounding | tables.pressed[token]) & ~tables.released[token],
        velocity=int(tables.velocity[token]) if tables.velocity[token] >= 0 else moment.velocity,
        pending_pitch=moment.pending_pitch if unchanged else int(tables.pending_pitch[token]),
        phase=moment.phase + passed if relative else int(tables.phase[token]),
        ticks=moment.ticks + passed,
    )
