"""Tables for ids that stand for one event or several in a row: their requirements and effects.

A token may come next if all its events may, one after the other. `TokenTables` checks this for a whole vocabulary at
once, without iterating over events: the requirements and effects of each token are computed in advance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dsmr_mlx.music.notes import PITCHES
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import EventGrammar, Moment, states_after

NEVER = 2**31 - 1
UNCHANGED = -2  # pending_pitch of a token that neither sets nor completes a note


class Moments(NamedTuple):
    """N consecutive moments, see `event_grammar.Moment`: int64 `(N,)` each, sounding bool `(N, 128)`."""

    state: np.ndarray
    sounding: np.ndarray
    velocity: np.ndarray
    pending_pitch: np.ndarray
    phase: np.ndarray
    ticks: np.ndarray


@dataclass(frozen=True, eq=False)
class TokenTables:
    """Tables for V tokens, Q states of the `grammar` of their events, and 128 keys.

    events: `(V, K)` int32, the events of each token, padded with −1; a token without events may never come

    Requirements on the moment before a token:
    allowed: `(Q, V)` bool, its first event may follow the state, and the others follow one another
    silent, sounding: `(V, 128)` bool, keys that must be up, or down
    first_velocity: `(V,)` int32, the index of the first running velocity that it sets, which must differ, or −1
    ends_in_velocity: `(V,)` bool, some key must be up after it to use its last running velocity
    max_phase: `(V,)` int32, the maximum of the ticks since the bar began
    ends: `(V,)` bool, all keys must be up after it because nothing may follow

    Effects:
    next_state: `(Q, V)` int32, by the state before it
    pressed, released: `(V, 128)` bool, keys that are down, or up, because of it
    velocity: `(V,)` int32, the index of the last velocity, or −1
    pending_pitch: `(V,)` int32, the pitch of a note whose velocity or length is still to come, −1, or UNCHANGED
    ticks: `(V,)` int32, the time that it takes, if `phase` is −1
    phase: `(V,)` int32, the ticks since the bar began after it, or −1 if it only adds `ticks` to them. If not −1, it
        takes the time ticks + phase − (ticks since the bar began before it)

    Contents:
    presses: `(V, 128)` bool, keys that it presses
    notes: `(V,)` int32, the number of presses
    net_presses: `(V,)` int32, by how much it changes the number of keys that are down
    peak: `(V,)` int32, the maximum of that change at any press, −128 without a press
    fades: `(V,)` bool, it consists of releases and pauses only
    """

    grammar: EventGrammar
    events: np.ndarray
    allowed: np.ndarray
    silent: np.ndarray
    sounding: np.ndarray
    first_velocity: np.ndarray
    ends_in_velocity: np.ndarray
    max_phase: np.ndarray
    ends: np.ndarray
    next_state: np.ndarray
    pressed: np.ndarray
    released: np.ndarray
    velocity: np.ndarray
    pending_pitch: np.ndarray
    ticks: np.ndarray
    phase: np.ndarray
    presses: np.ndarray
    notes: np.ndarray
    net_presses: np.ndarray
    peak: np.ndarray
    fades: np.ndarray

    @property
    def takes_time(self) -> np.ndarray:
        """`(V,)` bool: the tokens that may take time."""
        return (self.ticks > 0) | (self.phase >= 0)

    def after_any(self, states: np.ndarray) -> np.ndarray:
        """Return the tokens that lead to one of the `states` `(Q,)` from every state that allows them: bool `(V,)`."""
        return (states[self.next_state] | ~self.allowed).all(axis=0) & self.allowed.any(axis=0)

    def contains(self, events: np.ndarray) -> np.ndarray:
        """Return the tokens that contain an event of the mask `events` `(E,)`: bool `(V,)`."""
        return (events[self.events] & (self.events >= 0)).any(axis=1)

    def flat(self, ids: np.ndarray) -> np.ndarray:
        """Return the events of tokens `(T,)` one after the other, int64 `(T′,)`."""
        events = self.events[np.asarray(ids, np.int64)]
        return events[events >= 0].astype(np.int64)

    def after_all(self, before: Moment, ids: np.ndarray) -> Moment:
        """Return the moment after tokens `(T,)`."""
        events, grammar = self.flat(ids), self.grammar
        if not len(events):
            return before
        press, release = grammar.press[events], grammar.release[events]
        acts, sounding = (press >= 0) | (release >= 0), before.sounding.copy()
        if grammar.held:
            sounding[np.maximum(press, release)[acts]] = (press >= 0)[acts]  # the last one of a key counts
        pending = np.where(grammar.begins[events], -1, np.where(press >= 0, press, UNCHANGED))
        velocity = np.append(before.velocity, grammar.velocity[events])
        pending = np.append(before.pending_pitch, pending)
        passed = int(grammar.elapsed(events, before.phase)[-1])
        return Moment(
            state=int(states_after(grammar.next_state, before.state, events)[-1]),
            sounding=sounding,
            velocity=int(fill_forward(velocity, velocity >= 0)[-1]),
            pending_pitch=int(fill_forward(pending, pending != UNCHANGED)[-1]),
            phase=before.phase + passed - int(grammar.bar[events].sum()) * grammar.bar_ticks,
            ticks=before.ticks + passed,
        )

    def moments(self, before: Moment, ids: np.ndarray) -> Moments:
        """Return the T + 1 moments before each of the tokens `(T,)` and after the last. Every token must have events.

        The keys are correct even if the tokens break the grammar.
        """
        ids, grammar = np.asarray(ids, np.int64), self.grammar
        events = self.events[ids]
        flat = events[events >= 0]
        ends = np.append(0, np.cumsum((events >= 0).sum(axis=1)))  # (T + 1,) events before each moment
        passed = np.append(0, grammar.elapsed(flat, before.phase))[ends]
        bars = np.append(0, np.cumsum(grammar.bar[flat]))[ends]
        velocity = np.append(before.velocity, self.velocity[ids])
        pending = np.append(before.pending_pitch, self.pending_pitch[ids])
        return Moments(
            state=states_after(self.next_state, before.state, ids),
            sounding=self._sounding(before.sounding, ids),
            velocity=fill_forward(velocity, velocity >= 0),
            pending_pitch=fill_forward(pending, pending != UNCHANGED),
            phase=before.phase + passed - bars * grammar.bar_ticks,
            ticks=before.ticks + passed,
        )

    def _sounding(self, before: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return the keys that are down at each moment, bool `(T + 1, 128)`: the last token that uses a key decides."""
        pressed, released = self.pressed[ids], self.released[ids]
        down = np.concatenate([before[None], pressed])
        touched = np.concatenate([np.ones((1, PITCHES), bool), pressed | released])
        number = np.arange(len(touched), dtype=np.int32)[:, None]
        last = np.maximum.accumulate(number * touched, axis=0)
        return np.take_along_axis(down, last, axis=0)


def fill_forward(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Fill unknown values `(N,)` with the last known one before them. The first value counts as known."""
    return values[np.maximum.accumulate(np.where(known, np.arange(len(values)), 0))]


def token_tables(tokenizer: Tokenizer) -> TokenTables:
    """Return the tables of a tokenizer's ids.

    If the grammar of its events is unknown, each id is an event, and any but PAD and BOS may come, until EOS.
    """
    grammar, singles = tokenizer.event_grammar(), [(i,) for i in range(tokenizer.vocab_size)]
    if grammar is None:
        never = [i for i in (tokenizer.pad_id, tokenizer.bos_id) if i is not None]
        ending = [i for i in (tokenizer.eos_id,) if i is not None]
        return compose(EventGrammar.permissive(tokenizer.vocab_size, np.array(never), np.array(ending)), singles)
    return compose(grammar, singles if tokenizer.token_events is None else tokenizer.token_events)


def compose(grammar: EventGrammar, tokens: Sequence[Sequence[int]]) -> TokenTables:
    """Return the tables of tokens, each given by its events."""
    events = np.full((len(tokens), max(map(len, tokens), default=0) or 1), -1, np.int32)
    for row, token in zip(events, tokens, strict=True):
        row[: len(token)] = token
    composer = _Composer(grammar, len(events))
    for column in events.T:
        composer.add(column)
    first = events[:, 0]
    last = np.take_along_axis(events, np.maximum((events >= 0).sum(axis=1) - 1, 0)[:, None], axis=1)[:, 0]
    present, real = np.where(events >= 0, events, 0), events >= 0
    is_press = (grammar.press >= 0)[present] & real
    changes = np.cumsum(is_press.astype(np.int32) - ((grammar.release >= 0)[present] & real), axis=1) * grammar.held
    return TokenTables(
        grammar=grammar,
        events=events,
        allowed=composer.allowed & composer.possible & (first >= 0),
        silent=composer.silent,
        sounding=composer.sounding,
        first_velocity=composer.first_velocity,
        ends_in_velocity=(grammar.velocity[last] >= 0) & grammar.running_velocity,
        max_phase=composer.max_phase,
        ends=grammar.ends[last],
        next_state=composer.state,
        pressed=composer.touched & composer.down,
        released=composer.touched & ~composer.down,
        velocity=composer.velocity,
        pending_pitch=composer.pending_pitch,
        ticks=composer.ticks,
        phase=composer.phase,
        presses=composer.presses,
        notes=is_press.sum(axis=1).astype(np.int32),
        net_presses=changes[:, -1].astype(np.int32),
        peak=np.where(is_press, changes, -PITCHES).max(axis=1).astype(np.int32),
        fades=~(((grammar.press >= 0) | (grammar.velocity >= 0))[present] & real).any(axis=1),
    )


class _Composer:
    """Walks through all tokens at once, one event of each at a time, and records their requirements and effects."""

    def __init__(self, grammar: EventGrammar, n: int) -> None:
        self.grammar = grammar
        self.possible = np.ones(n, bool)
        states = len(grammar.allowed)
        self.allowed = np.ones((states, n), bool)  # one event may follow another
        self.state = np.repeat(np.arange(states, dtype=np.int32)[:, None], n, axis=1)
        self.silent, self.sounding, self.touched, self.down, self.presses = np.zeros((5, n, PITCHES), bool)
        self.first_velocity, self.velocity = np.full((2, n), -1, np.int32)
        self.pending_pitch = np.full(n, UNCHANGED, np.int32)
        self.ticks, self.phase = np.zeros(n, np.int32), np.full(n, -1, np.int32)
        self.max_phase = np.full(n, NEVER, np.int64)

    def add(self, column: np.ndarray) -> None:
        """Add the next event of each token `(V,)`, −1 if it has no more."""
        (rows,) = np.nonzero(column >= 0)
        events = column[rows]
        before = self.state[:, rows]
        self.allowed[:, rows] &= self.grammar.allowed[before, events]
        self.state[:, rows] = self.grammar.next_state[before, events]
        self._add_keys(rows, events)
        self._add_velocities(rows, events)
        self._add_time(rows, events)

    def _add_keys(self, rows: np.ndarray, events: np.ndarray) -> None:
        pitches, releases = self.grammar.press[events], self.grammar.release[events]
        is_press, begins = pitches >= 0, self.grammar.begins[events]
        self.presses[rows[is_press], pitches[is_press]] = True
        self.pending_pitch[rows[is_press]] = pitches[is_press]
        self.pending_pitch[rows[begins]] = -1
        if not self.grammar.held:
            return
        acts = is_press | (releases >= 0)
        rows, keys, down = rows[acts], np.maximum(pitches, releases)[acts], is_press[acts]
        known = self.touched[rows, keys]
        self.possible[rows] &= ~known | (self.down[rows, keys] != down)
        self.silent[rows, keys] |= ~known & down
        self.sounding[rows, keys] |= ~known & ~down
        self.touched[rows, keys] = True
        self.down[rows, keys] = down

    def _add_velocities(self, rows: np.ndarray, events: np.ndarray) -> None:
        velocity = self.grammar.velocity[events]
        rows, velocity = rows[velocity >= 0], velocity[velocity >= 0]
        if self.grammar.running_velocity:
            self.possible[rows] &= velocity != self.velocity[rows]
            first = self.velocity[rows] < 0
            self.first_velocity[rows[first]] = velocity[first]
        self.velocity[rows] = velocity

    def _add_time(self, rows: np.ndarray, events: np.ndarray) -> None:
        grammar = self.grammar
        bar, position, ticks = grammar.bar[events], grammar.position[events], grammar.ticks[events]
        waits = ~bar & (position < 0)
        fixed = self.phase[rows] >= 0
        self.ticks[rows[waits & ~fixed]] += ticks[waits & ~fixed]
        self.phase[rows[waits & fixed]] += ticks[waits & fixed]

        moves = ~bar & (position >= 0)
        # Time does not go back: phase before the token + pauses so far ≤ position.
        max_phase = np.where(fixed, NEVER, position - self.ticks[rows])
        self.max_phase[rows[moves]] = np.minimum(self.max_phase[rows], max_phase)[moves]
        self.possible[rows[moves & fixed]] &= (position >= self.phase[rows])[moves & fixed]

        # From here on the time is counted from the beginning of the bar: drop the pauses before.
        self.ticks[rows[(bar | moves) & ~fixed]] = 0
        self.ticks[rows[bar]] += grammar.bar_ticks
        self.phase[rows[moves]] = position[moves]
        self.phase[rows[bar]] = 0
