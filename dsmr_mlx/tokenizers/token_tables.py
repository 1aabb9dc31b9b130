"""Pieces: what the ids of a vocabulary stand for, one event or several in a row, and what follows from that as tables.

A piece may come next if all its events may, one after the other. `TokenTables` answers that for a whole vocabulary at
once, without a walk through the events: what a piece asks of the moment before it, and what it leaves behind, is
computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dsmr_mlx.music.notes import PITCHES
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import EventGrammar, Moment

NEVER = 2**31 - 1
UNCHANGED = -2


class Moments(NamedTuple):
    """N moments one after the other, see `event_grammar.Moment`: (N,) int64 each, sounding (N, 128) bool."""

    state: np.ndarray
    sounding: np.ndarray
    velocity: np.ndarray
    named: np.ndarray
    phase: np.ndarray
    ticks: np.ndarray


@dataclass(frozen=True, eq=False)
class TokenTables:
    """Tables for V pieces, Q states of the `grammar` of their events, and 128 keys.

    events: (V, K) int32, the events of each piece, −1 behind the last; a piece without events never comes.
    What a piece asks of the moment before it:
        allowed: (Q, V) bool, that its first event may follow the state (and the others one another)
        silent, sounding: (V, 128) bool, keys that must be silent, or sound
        first_velocity: (V,) int32, the index of the first running velocity that it sets, which must be another; or −1
        ends_in_velocity: (V,) bool, that some key must be silent after it, for there is no use for the velocity else
        latest: (V,) int32, that the bar has not lasted longer
        ends: (V,) bool, that nothing sounds after it, for nothing comes then
    What it leaves behind:
        next_state: (V,) int32
        pressed, released: (V, 128) bool, keys that sound, or are silent, where they may not have been
        velocity: (V,) int32, the index of the last velocity, or −1
        named: (V,) int32, the pitch of a note that is named and yet to begin, −1 for none, UNCHANGED for the one before
        ticks: (V,) int32, the time that it takes; phase: (V,) int32, how long the bar has lasted then, or −1 where it
            is just longer by `ticks`. Where it is known, the time is ticks + phase − (how long the bar had lasted)
    What it does on the way:
        strikes: (V, 128) bool, keys that are pressed; notes: (V,) int32, how many times that happens
        more: (V,) int32, how many keys more sound after it than before; peak: (V,) int32, the most by which they have
            become more when one is pressed, −128 where none is
        fades: (V,) bool, that it presses nothing and sets no velocity: releases and pauses only
    """

    grammar: EventGrammar
    events: np.ndarray
    allowed: np.ndarray
    silent: np.ndarray
    sounding: np.ndarray
    first_velocity: np.ndarray
    ends_in_velocity: np.ndarray
    latest: np.ndarray
    ends: np.ndarray
    next_state: np.ndarray
    pressed: np.ndarray
    released: np.ndarray
    velocity: np.ndarray
    named: np.ndarray
    ticks: np.ndarray
    phase: np.ndarray
    strikes: np.ndarray
    notes: np.ndarray
    more: np.ndarray
    peak: np.ndarray
    fades: np.ndarray

    @property
    def takes_time(self) -> np.ndarray:
        """`(V,)` bool: the pieces with which time may pass."""
        return (self.ticks > 0) | (self.phase >= 0)

    def contains(self, events: np.ndarray) -> np.ndarray:
        """(V,) bool: the pieces in which some event is one of `events` (E,) bool."""
        return (events[self.events] & (self.events >= 0)).any(axis=1)

    def flat(self, ids: np.ndarray) -> np.ndarray:
        """The events of pieces (T,), one after the other: int64 (T′,)."""
        events = self.events[np.asarray(ids, np.int64)]
        return events[events >= 0].astype(np.int64)

    def after_all(self, before: Moment, ids: np.ndarray) -> Moment:
        """The moment after some pieces (T,): as `after`, one by one, but at once."""
        events, grammar = self.flat(ids), self.grammar
        if not len(events):
            return before
        press, release = grammar.press[events], grammar.release[events]
        acts, sounding = (press >= 0) | (release >= 0), before.sounding.copy()
        if grammar.held:
            sounding[np.maximum(press, release)[acts]] = (press >= 0)[acts]  # of several, the last counts
        named = np.where(grammar.begins[events], -1, np.where(press >= 0, press, UNCHANGED))
        velocity, named = np.append(before.velocity, grammar.velocity[events]), np.append(before.named, named)
        passed = int(grammar.elapsed(events, before.phase)[-1])
        return Moment(
            state=int(grammar.next_state[events[-1]]),
            sounding=sounding,
            velocity=int(latest(velocity, velocity >= 0)[-1]),
            named=int(latest(named, named != UNCHANGED)[-1]),
            phase=before.phase + passed - int(grammar.bar[events].sum()) * grammar.bar_ticks,
            ticks=before.ticks + passed,
        )

    def moments(self, before: Moment, ids: np.ndarray) -> Moments:
        """The moments before each of some pieces (T,) and after the last, T + 1: as `after`, one by one, but at once.

        Pieces without events are not among them. Keys are right for pieces that may not come, too.
        """
        ids, grammar = np.asarray(ids, np.int64), self.grammar
        events = self.events[ids]
        ends = np.cumsum((events >= 0).sum(axis=1))
        flat = events[events >= 0]
        passed = np.append(0, grammar.elapsed(flat, before.phase))[np.append(0, ends)]
        bars = np.append(0, np.cumsum(grammar.bar[flat]))[np.append(0, ends)]
        velocity, named = np.append(before.velocity, self.velocity[ids]), np.append(before.named, self.named[ids])
        return Moments(
            state=np.append(before.state, self.next_state[ids]),
            sounding=self._sounding(before.sounding, ids),
            velocity=latest(velocity, velocity >= 0),
            named=latest(named, named != UNCHANGED),
            phase=before.phase + passed - bars * grammar.bar_ticks,
            ticks=before.ticks + passed,
        )

    def _sounding(self, before: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """(T + 1, 128) bool: the keys that sound, which the last piece has decided that touched them."""
        pressed, released = self.pressed[ids], self.released[ids]
        down = np.concatenate([before[None], pressed])
        touched = np.concatenate([np.ones((1, PITCHES), bool), pressed | released])
        number = np.arange(len(touched), dtype=np.int32)[:, None]
        last = np.maximum.accumulate(number * touched, axis=0)
        return np.take_along_axis(down, last, axis=0)


def latest(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(N,) values, each the last one up to there that is known; the first one is, whatever it is."""
    return values[np.maximum.accumulate(np.where(known, np.arange(len(values)), 0))]


def token_tables(tokenizer: Tokenizer) -> TokenTables:
    """The tables of a tokenizer's ids. If the grammar of its events is not known, each id is an event of its own, and
    any may come but PAD and BOS, until EOS.
    """
    grammar, singles = tokenizer.event_grammar(), [(i,) for i in range(tokenizer.vocab_size)]
    if grammar is None:
        never = [i for i in (tokenizer.pad_id, tokenizer.bos_id) if i is not None]
        ending = [i for i in (tokenizer.eos_id,) if i is not None]
        return compose(EventGrammar.permissive(tokenizer.vocab_size, np.array(never), np.array(ending)), singles)
    return compose(grammar, singles if tokenizer.token_events is None else tokenizer.token_events)


def compose(grammar: EventGrammar, pieces: Sequence[Sequence[int]]) -> TokenTables:
    """The tables of some pieces, each given by its events."""
    events = np.full((len(pieces), max(map(len, pieces), default=0) or 1), -1, np.int32)
    for row, piece in zip(events, pieces, strict=True):
        row[: len(piece)] = piece
    composer = _Composer(grammar, len(events))
    for column in events.T:
        composer.add(column)
    first = events[:, 0]
    last = np.take_along_axis(events, np.maximum((events >= 0).sum(axis=1) - 1, 0)[:, None], axis=1)[:, 0]
    present, real = np.where(events >= 0, events, 0), events >= 0
    presses = (grammar.press >= 0)[present] & real
    changes = np.cumsum(presses.astype(np.int32) - ((grammar.release >= 0)[present] & real), axis=1) * grammar.held
    return TokenTables(
        grammar=grammar,
        events=events,
        allowed=grammar.allowed[:, first] & (composer.possible & (first >= 0)),
        silent=composer.silent,
        sounding=composer.sounding,
        first_velocity=composer.first_velocity,
        ends_in_velocity=(grammar.velocity[last] >= 0) & grammar.running_velocity,
        latest=composer.latest,
        ends=grammar.ends[last],
        next_state=grammar.next_state[last],
        pressed=composer.touched & composer.down,
        released=composer.touched & ~composer.down,
        velocity=composer.velocity,
        named=composer.named,
        ticks=composer.ticks,
        phase=composer.phase,
        strikes=composer.strikes,
        notes=presses.sum(axis=1).astype(np.int32),
        more=changes[:, -1].astype(np.int32),
        peak=np.where(presses, changes, -PITCHES).max(axis=1).astype(np.int32),
        fades=~(((grammar.press >= 0) | (grammar.velocity >= 0))[present] & real).any(axis=1),
    )


class _Composer:
    """Walks through all pieces at once, one event of each at a time, and notes what they ask and what they do."""

    def __init__(self, grammar: EventGrammar, n: int) -> None:
        self.grammar = grammar
        self.possible = np.ones(n, bool)
        self.state = np.full(n, -1)
        self.silent, self.sounding, self.touched, self.down, self.strikes = np.zeros((5, n, PITCHES), bool)
        self.first_velocity, self.velocity = np.full((2, n), -1, np.int32)
        self.named = np.full(n, UNCHANGED, np.int32)
        self.ticks, self.phase = np.zeros(n, np.int32), np.full(n, -1, np.int32)
        self.latest = np.full(n, NEVER, np.int64)

    def add(self, column: np.ndarray) -> None:
        """The next event of each piece (V,), −1 where there is none."""
        (rows,) = np.nonzero(column >= 0)
        events = column[rows]
        later = self.state[rows] >= 0
        follows = self.grammar.allowed[np.maximum(self.state[rows], 0), events]
        self.possible[rows] &= ~later | follows
        self.state[rows] = self.grammar.next_state[events]
        self._add_keys(rows, events)
        self._add_velocities(rows, events)
        self._add_time(rows, events)

    def _add_keys(self, rows: np.ndarray, events: np.ndarray) -> None:
        presses, releases = self.grammar.press[events], self.grammar.release[events]
        struck, begins = presses >= 0, self.grammar.begins[events]
        self.strikes[rows[struck], presses[struck]] = True
        self.named[rows[struck]] = presses[struck]
        self.named[rows[begins]] = -1
        if not self.grammar.held:
            return
        acts = struck | (releases >= 0)
        rows, keys, down = rows[acts], np.maximum(presses, releases)[acts], struck[acts]
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
        early = np.where(fixed, NEVER, position - self.ticks[rows])
        self.latest[rows[moves]] = np.minimum(self.latest[rows], early)[moves]
        self.possible[rows[moves & fixed]] &= (position >= self.phase[rows])[moves & fixed]

        # From here on the time is known from the bar's beginning: pauses before count no more.
        self.ticks[rows[(bar | moves) & ~fixed]] = 0
        self.ticks[rows[bar]] += grammar.bar_ticks
        self.phase[rows[moves]] = position[moves]
        self.phase[rows[bar]] = 0
