"""Walking a tokenizer's grammar while sampling: which ids may come next, given what each lane has played so far.

Everything stays in MLX arrays, so that no step waits for the host.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import mlx.core as mx
import numpy as np

from dsmr_mlx.errors import UserError
from dsmr_mlx.performance import Grammar
from dsmr_mlx.tokenizer import Tokenizer

PITCHES = 128
NEVER = 2**31 - 1
RELEASE_TICKS, RELEASE_TOKENS = 300, 64  # how long the last notes may ring on after a limit; then all keys go up
ENDING_TOKENS = 5  # what an end takes besides the releases: a note that is due, a pause after it, EOS


class Played(NamedTuple):
    """What B lanes have played: grammar state, keys that sound, running velocity, and how much since the start.

    state `[B]`, sounding `[B, 128]` bool, velocity `[B]` (−1 before the first), ticks `[B]`, tokens `[B]`;
    int32 but for `sounding`
    """

    state: mx.array
    sounding: mx.array
    velocity: mx.array
    ticks: mx.array
    tokens: mx.array

    def take(self, lanes: list[int]) -> Self:
        return type(self)(*(mx.take(array, mx.array(lanes), axis=0) for array in self))


@dataclass(frozen=True)
class Limits:
    """When a lane should end: after so many ticks or tokens from now it releases what sounds, in the model's own time.

    All is released at most `RELEASE_TICKS` after the limit on ticks. After the limit on tokens the model has
    `RELEASE_TOKENS` more, then only releases follow, one for each key.
    room: tokens that there can be at all, EOS included; while just enough are left, all is released at once
    may_end: whether the model may end the piece earlier by itself

    A vocabulary whose EOS is not known has no end but one: the stream is cut after so many tokens.
    """

    ticks: int = NEVER
    tokens: int = NEVER
    room: int = NEVER
    may_end: bool = False


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
    """The grammar of a tokenizer as MLX tables, and the way through it."""

    def __init__(self, tokenizer: Tokenizer):
        grammar = tokenizer.grammar() or permissive_grammar(tokenizer)
        self.tokenizer = tokenizer
        self.start = grammar.start
        self.pad_id = tokenizer.pad_id or 0  # what ended lanes give: their state says that it means nothing
        self.ending = special_ids(tokenizer.eos_id)
        self.specials = special_ids(tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
        self.tables = grammar
        self.allowed_after = mx.array(grammar.allowed)  # (Q, V)
        self.next_state = mx.array(grammar.next_state)  # (V,)
        self.ticks = mx.array(grammar.ticks)
        self.velocity = mx.array(grammar.velocity)
        self.press, self.release = mx.array(grammar.press), mx.array(grammar.release)
        self.key = mx.array(np.maximum(np.maximum(grammar.press, grammar.release), 0))
        self.is_release, self.is_velocity = self.release >= 0, self.velocity >= 0
        self.is_no_key = mx.array((grammar.press < 0) & (grammar.release < 0))
        self.has_ended = mx.array(~grammar.allowed.any(axis=1))  # (Q,)
        self.is_end = mx.array(np.isin(np.arange(tokenizer.vocab_size), self.ending))
        self.is_pad = mx.arange(tokenizer.vocab_size) == self.pad_id

    def check(self, limits: Limits) -> None:
        """Raise `UserError` for limits that mean nothing in this vocabulary."""
        kind = self.tokenizer.kind
        if limits.ticks < NEVER and not self.tables.ticks.any():
            raise UserError(f"tokenizer {kind!r}: its tokens have no known duration, give a number of tokens")
        if limits.may_end and self.tokenizer.eos_id is None:
            raise UserError(f"tokenizer {kind!r}: how a piece ends is not known, give a number of tokens")

    def bounds(self, limits: Limits, played: Played) -> Bounds:
        """The limits counted from what has been `played`; without an EOS there is none on tokens (see `Limits`)."""
        ends = self.tokenizer.eos_id is not None
        ticks, tokens = np.array(played.ticks, np.int64), np.array(played.tokens, np.int64)
        counts = (
            ticks + limits.ticks,
            tokens + (limits.tokens if ends else NEVER),
            ticks + limits.ticks + RELEASE_TICKS,
            tokens + (limits.tokens if ends else NEVER) + RELEASE_TOKENS,
            tokens + (limits.room if ends else NEVER),
        )
        return Bounds(*(mx.array(np.minimum(c, NEVER).astype(np.int32)) for c in counts), mx.array(limits.may_end))

    def begin(self, ids: np.ndarray) -> Played:
        """One lane that has played `ids` `[T]` (PAD, BOS and EOS have no effect); its clock starts now."""
        state, velocity, zero = (mx.array([value], mx.int32) for value in (self.start, -1, 0))
        silence = Played(state, mx.zeros((1, PITCHES), mx.bool_), velocity, zero, zero)
        return self.read(silence, ids)._replace(ticks=zero, tokens=zero)

    def read(self, played: Played, ids: np.ndarray) -> Played:
        """What has been played after all lanes have read `ids` `[T]` besides (PAD, BOS and EOS have no effect).

        The same as `advance` T times, and at once; music goes on where a lane has ended.
        """
        g = self.tables
        ids = np.asarray(ids, np.int64)
        ids = ids[~np.isin(ids, self.specials)]
        if not len(ids):
            return played
        keys = ids[(g.press[ids] >= 0) | (g.release[ids] >= 0)]
        pitches = np.maximum(g.press[keys], g.release[keys])
        moved, down = np.zeros(PITCHES, bool), np.zeros(PITCHES, bool)
        moved[pitches], down[pitches] = True, g.press[keys] >= 0  # of several, the last counts
        velocities = g.velocity[ids][g.velocity[ids] >= 0]
        return Played(
            state=mx.full(played.state.shape, int(g.next_state[ids[-1]]), mx.int32),
            sounding=mx.where(mx.array(moved), mx.array(down), played.sounding),
            velocity=mx.full(played.velocity.shape, int(velocities[-1]), mx.int32)
            if len(velocities)
            else played.velocity,
            ticks=played.ticks + int(g.ticks[ids].sum()),
            tokens=played.tokens + len(ids),
        )

    def check_open(self, played: Played, ids: np.ndarray) -> None:
        """Raise `UserError` if `ids` `[T]`, the last that was played, broke the grammar so that nothing may follow."""
        if not self.allowed(played, self.bounds(Limits(), played)).any(axis=-1).all().item():
            raise UserError(f"prompt: nothing may follow its last id, {ids[-1]}; expected music that can go on")

    def allowed(self, played: Played, bounds: Bounds) -> mx.array:
        """`[B, V]` bool: the ids that may come next; at least one in every lane, PAD alone after the end.

        Where a limit falls into silence, EOS may follow whatever came last: `generation.finish` makes it tidy.
        """
        sounding = played.sounding  # (B, 128)
        # Keys that are pressed must be silent, keys that are released must sound.
        key_fits = self.is_no_key | (mx.take(sounding, self.key, axis=1) == self.is_release)
        useless = (self.velocity == played.velocity[:, None]) | sounding.all(axis=-1, keepdims=True)
        may = self.allowed_after[played.state] & key_fits & ~(self.is_velocity & useless)
        silence = ~sounding.any(axis=-1, keepdims=True)
        going_on = may & (~self.is_end | (silence & bounds.may_end))
        over = (played.ticks >= bounds.ticks) | (played.tokens >= bounds.tokens) | self._cramped(played, bounds)
        may_now = mx.where(over[:, None], mx.where(silence, self.is_end, self._fading(may, played, bounds)), going_on)
        return mx.where(self.has_ended[played.state][:, None], self.is_pad, may_now)

    def _fading(self, may: mx.array, played: Played, bounds: Bounds) -> mx.array:
        """Of what may come while keys still sound: releases and short pauses, and after a while only releases."""
        late = ((played.tokens >= bounds.last_token) | self._cramped(played, bounds))[:, None]
        in_time = (self.ticks > 0) & (self.ticks <= (bounds.last_tick - played.ticks)[:, None])
        releases = may & self.is_release
        only_releases = late & releases.any(axis=-1, keepdims=True)
        fading = releases | (may & in_time & ~only_releases)
        return mx.where(fading.any(axis=-1, keepdims=True), fading, may & ~self.is_end)

    def _cramped(self, played: Played, bounds: Bounds) -> mx.array:
        """`[B]` bool: the room that is left is needed for the end."""
        return played.tokens + played.sounding.sum(axis=-1) >= bounds.room - ENDING_TOKENS

    def advance(self, played: Played, tokens: mx.array) -> Played:
        """What has been played after one more token `[B]` in each lane."""
        keys = mx.arange(PITCHES)
        pressed = keys == self.press[tokens][:, None]
        released = keys == self.release[tokens][:, None]
        velocity = self.velocity[tokens]
        return Played(
            state=mx.where(self.has_ended[played.state], played.state, self.next_state[tokens]),
            sounding=(played.sounding | pressed) & ~released,
            velocity=mx.where(velocity >= 0, velocity, played.velocity),
            ticks=played.ticks + self.ticks[tokens],
            tokens=played.tokens + 1,
        )

    def awake(self, played: Played) -> Played:
        """The same, but lanes that have ended begin anew: for music that goes on after an end."""
        return played._replace(state=mx.where(self.has_ended[played.state], self.start, played.state))


def special_ids(*ids: int | None) -> np.ndarray:
    """Those of the ids that a vocabulary has, int64."""
    return np.array([i for i in ids if i is not None], np.int64)


def permissive_grammar(tokenizer: Tokenizer) -> Grammar:
    """For a tokenizer that has no grammar: any id but PAD and BOS may come at any time, until the end."""
    ids = np.arange(tokenizer.vocab_size)
    is_end = np.isin(ids, special_ids(tokenizer.eos_id))
    may = is_end | ~np.isin(ids, special_ids(tokenizer.pad_id, tokenizer.bos_id))
    nothing = np.full(len(ids), -1, np.int32)
    return Grammar(
        allowed=np.stack([may, np.zeros_like(may)]),
        next_state=is_end.astype(np.int32),
        press=nothing,
        release=nothing,
        ticks=np.zeros(len(ids), np.int32),
        velocity=nothing,
        start=0,
        seconds_per_tick=0.01,
        states=("PIECE", "END"),
    )
