"""Walking a tokenizer's grammar while sampling: which ids may come next, given what each lane has played so far.

Everything stays in MLX arrays, so that no step waits for the host.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import mlx.core as mx
import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import Moment, beginning
from dsmr_mlx.tokenizers.token_tables import UNCHANGED, token_tables

PITCHES = 128
NEVER = 2**31 - 1
RELEASE_SECONDS, RELEASE_TOKENS = 3.0, 64  # how long the last notes may ring on after a limit; then all keys go up
ENDING_TOKENS = 5  # what an end takes besides the releases: a note that is due, a pause after it, EOS


class Played(NamedTuple):
    """What B lanes have played: grammar state, keys that are held, the last velocity, a note that is named and yet to
    begin, how long the bar has lasted, and how much has been played since the piece began.

    state `[B]`, sounding `[B, 128]` bool, velocity `[B]` (its index, −1 before the first), named `[B]` (a pitch or −1),
    phase `[B]` in ticks, ticks `[B]`, tokens `[B]`, begun `[B]`; int32 but for `sounding`. Notes that are told with
    their lengths hold no key.

    There is one clock, `ticks`. It runs from the first event of the piece on, through prompts, what is read later and
    what is drawn, and goes back with the music. `begun` is what it showed at the end of the prompt: new music has
    lasted for ticks − begun.
    """

    state: mx.array
    sounding: mx.array
    velocity: mx.array
    named: mx.array
    phase: mx.array
    ticks: mx.array
    tokens: mx.array
    begun: mx.array

    @property
    def new_ticks(self) -> mx.array:
        """How long the new music has lasted, `[B]`."""
        return self.ticks - self.begun

    def take(self, lanes: Sequence[int]) -> Self:
        index = mx.array(list(lanes), mx.int32)
        return type(self)(*(mx.take(array, index, axis=0) for array in self))


@dataclass(frozen=True)
class Limits:
    """When a lane should end: after so many ticks or tokens from now it releases what sounds, in the model's own time.

    All is released at most `RELEASE_SECONDS` after the limit on ticks. After the limit on tokens the model has
    `RELEASE_TOKENS` more, then only releases follow, one for each key.
    room: tokens that there can be at all, EOS included; while just enough are left, all is released at once
    may_end: whether the model may end the piece earlier by itself
    since: what the clock shows where `ticks` are counted from, in all lanes or in each; None: now

    A vocabulary whose EOS is not known has no end but one: the stream is cut after so many tokens.
    """

    ticks: int = NEVER
    tokens: int = NEVER
    room: int = NEVER
    may_end: bool = False
    since: tuple[int, ...] | None = None


class Bounds(NamedTuple):
    """`Limits` on the lanes' own counters, as arrays, so that one compiled step serves all of them: `[B]` int32.

    ticks, tokens: from when on a lane fades out; last_tick: the last one in which keys may ring on; last_token: from
    when on only releases follow; room: tokens that there can be at all; may_end: scalar bool
    """

    ticks: mx.array
    tokens: mx.array
    last_tick: mx.array
    last_token: mx.array
    room: mx.array
    may_end: mx.array


class GrammarWalk:
    """The grammar of a tokenizer as MLX tables, and the way through it; `tables` are the same in NumPy.

    A tokenizer whose grammar is not known may have any id but PAD and BOS at any time, until EOS.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tables = t = token_tables(tokenizer)
        self.tokenizer, self.grammar = tokenizer, t.grammar
        self.pad_id = tokenizer.pad_id or 0  # what ended lanes give: their state says that it means nothing
        self.ending = special_ids(tokenizer.eos_id)
        specials = special_ids(tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
        self.specials = np.union1d(specials, np.flatnonzero(t.events[:, 0] < 0))  # what stands for no event, too
        self.release_ticks = round(RELEASE_SECONDS / t.grammar.seconds_per_tick)
        self.allowed_after = mx.array(t.allowed)  # (Q, V)
        self.has_ended = mx.array(~t.grammar.allowed.any(axis=1))  # (Q,)
        # A key that must be silent counts 1 where it sounds, one that must sound counts 1 where it is silent.
        self.wrong_keys = mx.array((t.silent.astype(np.float32) - t.sounding).T)  # (128, V)
        self.must_sound = mx.array(t.sounding.sum(axis=1).astype(np.float32))  # (V,)
        self.first_velocity = mx.array(np.where(t.first_velocity < 0, -2, t.first_velocity))  # (V,)
        self.more = mx.array(t.more)  # (V,)
        self.ends_in_velocity = mx.array(t.ends_in_velocity)
        self.fades = mx.array(t.fades & ~np.isin(np.arange(tokenizer.vocab_size), self.ending))
        self.releases = mx.array(t.fades & t.released.any(axis=1))
        self.names_notes = bool((t.named >= 0).any())
        self.latest = mx.array(np.minimum(t.latest, NEVER).astype(np.int32))
        self.ticks, self.phase = mx.array(t.ticks), mx.array(t.phase)
        self.effects = mx.array(np.stack([t.next_state, t.velocity, t.named, t.ticks, t.phase], axis=1))  # (V, 5)
        self.pressed, self.released = mx.array(t.pressed), mx.array(t.released)  # (V, 128)
        self.is_end = mx.array(np.isin(np.arange(tokenizer.vocab_size), self.ending))
        self.is_pad = mx.arange(tokenizer.vocab_size) == self.pad_id
        self.closes = mx.array((t.events[:, 0] == t.grammar.closing) & ((t.events >= 0).sum(axis=1) == 1))
        self.plays_on = mx.array((t.notes > 0) & t.takes_time)  # presses keys, and time may pass besides
        self.due = mx.array(t.more + t.ends_in_velocity)  # keys that have to be released or pressed besides, after it
        self.is_brief = mx.array((t.notes <= 1) & ~t.takes_time & ~t.ends_in_velocity)
        self.has_pieces = bool(((t.events >= 0).sum(axis=1) > 1).any())

    def check(self, limits: Limits) -> None:
        """Raise `UserError` for limits that mean nothing in this vocabulary."""
        label = self.tokenizer.label
        if limits.ticks < NEVER and not self.grammar.has_clock:
            raise UserError(f"tokenizer {label}: its tokens have no known duration, give a number of tokens")
        if limits.may_end and self.tokenizer.eos_id is None:
            raise UserError(f"tokenizer {label}: how a piece ends is not known, give a number of tokens")

    def bounds(self, limits: Limits, played: Played) -> Bounds:
        """The limits counted from what has been `played`; without an EOS there is none on tokens (see `Limits`)."""
        ends = self.tokenizer.eos_id is not None
        ticks, tokens = np.array(played.ticks, np.int64), np.array(played.tokens, np.int64)
        ticks = ticks if limits.since is None else np.full_like(ticks, limits.since)
        most_ticks = min(limits.ticks, NEVER)
        most_tokens, room = (min(limit, NEVER) if ends else NEVER for limit in (limits.tokens, limits.room))
        counts = (
            ticks + most_ticks,
            tokens + most_tokens,
            ticks + most_ticks + self.release_ticks,
            tokens + most_tokens + RELEASE_TOKENS,
            tokens + room,
        )
        return Bounds(*(mx.array(np.minimum(c, NEVER).astype(np.int32)) for c in counts), mx.array(limits.may_end))

    def begin(self, ids: np.ndarray) -> Played:
        """One lane that has played the prompt `ids` `[T]` (PAD, BOS and EOS have no effect); new music begins now."""
        before = as_played([[value] for value in beginning(self.grammar)], np.zeros(1), np.zeros(1))
        played = self.read(before, ids)
        return played._replace(begun=played.ticks)

    def read(self, played: Played, ids: np.ndarray) -> Played:
        """What has been played after all lanes have read `ids` `[T]` besides (PAD, BOS and EOS have no effect).

        The same as `advance` T times, and at once; music goes on where a lane has ended.
        """
        ids = np.asarray(ids, np.int64)
        ids = ids[~np.isin(ids, self.specials)]
        if not len(ids):
            return played
        after = [self.tables.after_all(moment, ids) for moment in self.moments(self.awake(played))]
        return as_played(zip(*after, strict=True), np.array(played.tokens) + len(ids), played.begun)

    def after_each(self, played: Played, ids: np.ndarray) -> Played:
        """What one lane has played before each of `ids` `[T]`, neither PAD nor BOS, and after the last: T + 1 lanes."""
        (before,) = self.moments(played)
        tokens = played.tokens.item() + np.arange(len(ids) + 1)
        return as_played(self.tables.moments(before, ids), tokens, np.full(len(tokens), played.begun.item()))

    def moments(self, played: Played) -> list[Moment]:
        """The moment that each lane is in."""
        arrays = {name: np.array(array) for name, array in played._asdict().items() if name in Moment._fields}
        columns = (array if name == "sounding" else array.tolist() for name, array in arrays.items())
        return [Moment(*values) for values in zip(*columns, strict=True)]

    def check_open(self, played: Played, ids: np.ndarray) -> None:
        """Raise `UserError` if `ids` `[T]`, the last that was played, broke the grammar so that nothing may follow."""
        if not self.allowed(played, self.bounds(Limits(), played)).any(axis=-1).all().item():
            raise UserError(f"prompt: nothing may follow its last id, {ids[-1]}; expected music that can go on")

    def keys_fit(self, played: Played) -> mx.array:
        """`[B, V]` bool: keys that an id presses are silent, keys that it releases sound."""
        return played.sounding.astype(mx.float32) @ self.wrong_keys + self.must_sound == 0

    def passed(self, played: Played) -> mx.array:
        """`[B, V]` int32, `[1, V]` where it is always the same: the ticks that each id would take."""
        return passed(self.ticks, self.phase, played) if self.grammar.bar_ticks else self.ticks[None]

    def allowed(self, played: Played, bounds: Bounds) -> mx.array:
        """`[B, V]` bool: the ids that may come next; at least one in every lane, PAD alone after the end.

        No id that presses keys goes past the limit on ticks, for of several events they might begin behind it; and none
        presses so many that there is no room to release them. Where a limit falls into silence, EOS may follow whatever
        came last: `generation.finish` makes it tidy.
        """
        down, g = played.sounding.sum(axis=-1, keepdims=True), self.grammar  # (B, 1)
        may = self.allowed_after[played.state]
        if g.held:
            may = may & self.keys_fit(played)
        if g.running_velocity:
            same = self.first_velocity == played.velocity[:, None]
            may = may & ~(same | (self.ends_in_velocity & (down + self.more == PITCHES)))
        if g.bar_ticks:
            may = may & (self.latest >= played.phase[:, None])
        silence = down == 0
        going_on = may & (~self.is_end | (silence & bounds.may_end))
        if self.has_pieces:
            too_late = self.plays_on & (self.passed(played) > (bounds.ticks - played.ticks)[:, None])
            room = (bounds.room - ENDING_TOKENS - played.tokens)[:, None] - down
            too_many = (self.due > 1) & (self.due > room)
            going_on = unless_none(going_on & ~too_late & ~too_many, going_on)
        # The room that is left is needed for the end.
        cramped = played.tokens + down[:, 0] >= bounds.room - ENDING_TOKENS
        over = (played.ticks >= bounds.ticks) | (played.tokens >= bounds.tokens) | cramped
        end = self.is_end
        if g.closing >= 0:
            end = unless_none(may & self.closes, end)
        may_now = mx.where(over[:, None], mx.where(silence, end, self._fading(may, cramped, played, bounds)), going_on)
        return mx.where(self.has_ended[played.state][:, None], self.is_pad, may_now)

    def _fading(self, may: mx.array, cramped: mx.array, played: Played, bounds: Bounds) -> mx.array:
        """Of what may come while keys still sound: releases and short pauses, and after a while only releases."""
        late = ((played.tokens >= bounds.last_token) | cramped)[:, None]
        passed = self.passed(played)
        releases = may & self.releases & (passed == 0)
        in_time = self.fades & (passed > 0) & (passed <= (bounds.last_tick - played.ticks)[:, None])
        only_releases = late & releases.any(axis=-1, keepdims=True)
        fading = releases | (may & in_time & ~only_releases)
        due = may & ~self.is_end  # a key whose velocity is set already
        return unless_none(fading, unless_none(due & self.is_brief, due) if self.has_pieces else due)

    def advance(self, played: Played, tokens: mx.array) -> Played:
        """What has been played after one more token `[B]` in each lane."""
        state, velocity, named, ticks, phase = (column[:, 0] for column in mx.split(self.effects[tokens], 5, axis=-1))
        passed, new_phase = ticks, played.phase + ticks
        if self.grammar.bar_ticks:
            is_relative = phase < 0
            passed = mx.where(is_relative, ticks, ticks + phase - played.phase)
            new_phase = mx.where(is_relative, new_phase, phase)
        return Played(
            state=mx.where(self.has_ended[played.state], played.state, state),
            sounding=(played.sounding | self.pressed[tokens]) & ~self.released[tokens],
            velocity=mx.where(velocity >= 0, velocity, played.velocity),
            named=mx.where(named == UNCHANGED, played.named, named) if self.names_notes else played.named,
            phase=new_phase,
            ticks=played.ticks + passed,
            tokens=played.tokens + 1,
            begun=played.begun,
        )

    def awake(self, played: Played) -> Played:
        """The same, but lanes that have ended begin anew: for music that goes on after an end."""
        ended = self.has_ended[played.state]
        return played._replace(
            state=mx.where(ended, self.grammar.start, played.state),
            phase=mx.where(ended, self.grammar.first_phase, played.phase),
        )


def as_played(moments: Iterable[Sequence], tokens: np.ndarray, begun: np.ndarray) -> Played:
    """N moments, given field by field, how many tokens have been played and when new music began `[N]`, as N lanes."""
    arrays = [np.asarray(array) for array in (*moments, tokens, begun)]
    return Played(*(mx.array(array if array.dtype == bool else array.astype(np.int32)) for array in arrays))


def unless_none(some: mx.array, else_: mx.array) -> mx.array:
    """`some` `[B, V]` bool, but `else_` in lanes where there is none."""
    return mx.where(some.any(axis=-1, keepdims=True), some, else_)


def passed(ticks: mx.array, phase: mx.array, played: Played) -> mx.array:
    """`[B, V]` int32: the ticks that each id would take; `ticks`, `phase`: of `TokenTables`, `[V]` or `[B, V]`."""
    return ticks + mx.where(phase < 0, 0, phase - played.phase[:, None])


def special_ids(*ids: int | None) -> np.ndarray:
    """Those of the ids that a vocabulary has, int64."""
    return np.array([i for i in ids if i is not None], np.int64)
