"""Walking a tokenizer's grammar while sampling: which ids may come next, given what each lane has played so far.

Everything stays in MLX arrays, so that no step waits for the host.
"""

import math
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
    """When a lane should end: after so many ticks or tokens it releases what sounds, in the model's own time.

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


class GrammarWalk:
    """The grammar of a tokenizer, as MLX tables, and the limits of what is to be played."""

    def __init__(self, tokenizer: Tokenizer, limits: Limits):
        grammar = tokenizer.grammar() or permissive_grammar(tokenizer)
        if limits.ticks < NEVER and not grammar.ticks.any():
            raise UserError(f"tokenizer {tokenizer.kind!r}: its tokens have no known duration, give a number of tokens")
        self.most_tokens: float = math.inf  # after which the stream is cut
        if tokenizer.eos_id is None:
            if limits.may_end:
                raise UserError(f"tokenizer {tokenizer.kind!r}: how a piece ends is not known, give a number of tokens")
            self.most_tokens, limits = limits.tokens, Limits(ticks=limits.ticks)
        self.tokenizer, self.limits = tokenizer, limits
        self.start = grammar.start
        self.pad_id = tokenizer.pad_id or 0  # what ended lanes give: their state says that it means nothing
        self.ending = special_ids(tokenizer.eos_id)
        self.specials = special_ids(tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
        self.tables = grammar
        self.last_tick = min(limits.ticks, NEVER - RELEASE_TICKS) + RELEASE_TICKS
        self.last_token = min(limits.tokens, NEVER - RELEASE_TOKENS) + RELEASE_TOKENS
        self.allowed_after = mx.array(grammar.allowed)  # (Q, V)
        self.next_state = mx.array(grammar.next_state)  # (V,)
        self.ticks = mx.array(grammar.ticks)
        self.velocity = mx.array(grammar.velocity)
        self.press, self.release = mx.array(grammar.press), mx.array(grammar.release)
        self.is_press, self.is_release = self.press >= 0, self.release >= 0
        self.has_ended = mx.array(~grammar.allowed.any(axis=1))  # (Q,)
        self.is_end = mx.array(np.isin(np.arange(tokenizer.vocab_size), self.ending))
        self.is_pad = mx.arange(tokenizer.vocab_size) == self.pad_id

    def begin(self, ids: np.ndarray) -> Played:
        """One lane that has played `ids` `[T]` (PAD, BOS and EOS have no effect); its clock starts now.

        Raises `UserError` for a prompt that breaks the grammar so that nothing may follow it.
        """
        g = self.tables
        ids = np.asarray(ids, np.int64)
        ids = ids[~np.isin(ids, self.specials)]
        keys = ids[(g.press[ids] >= 0) | (g.release[ids] >= 0)]
        sounding = np.zeros(PITCHES, bool)
        sounding[np.maximum(g.press[keys], g.release[keys])] = g.press[keys] >= 0  # of several, the last counts
        velocity = np.append(-1, g.velocity[ids][g.velocity[ids] >= 0])[-1]
        state = g.next_state[ids[-1]] if len(ids) else self.start
        scalars = (mx.array([value], mx.int32) for value in (int(state), int(velocity), 0, 0))
        state, velocity, ticks, tokens = scalars
        played = Played(state, mx.array(sounding)[None], velocity, ticks, tokens)
        if not self.allowed(played).any().item():
            raise UserError(f"prompt: nothing may follow its last id, {ids[-1]}; expected music that can go on")
        return played

    def allowed(self, played: Played) -> mx.array:
        """`[B, V]` bool: the ids that may come next; at least one in every lane, PAD alone after the end.

        Where a limit falls into silence, EOS may follow whatever came last: `generation.finish` makes it tidy.
        """
        sounding = played.sounding  # (B, 128)
        silent_key = mx.where(self.is_press, ~sounding[:, mx.maximum(self.press, 0)], True)
        sounding_key = mx.where(self.is_release, sounding[:, mx.maximum(self.release, 0)], True)
        useful = (self.velocity != played.velocity[:, None]) & ~sounding.all(axis=-1, keepdims=True)
        may = self.allowed_after[played.state] & silent_key & sounding_key & (useful | (self.velocity < 0))
        silence = ~sounding.any(axis=-1, keepdims=True)
        going_on = may & ~self.is_end | (may & silence if self.limits.may_end else False)
        over = (played.ticks >= self.limits.ticks) | (played.tokens >= self.limits.tokens) | self._cramped(played)
        may_now = mx.where(over[:, None], mx.where(silence, self.is_end, self._fading(may, played)), going_on)
        return mx.where(self.has_ended[played.state][:, None], self.is_pad, may_now)

    def _fading(self, may: mx.array, played: Played) -> mx.array:
        """Of what may come while keys still sound: releases and short pauses, and after a while only releases."""
        late = ((played.tokens >= self.last_token) | self._cramped(played))[:, None]
        in_time = (self.ticks > 0) & (played.ticks[:, None] + self.ticks <= self.last_tick)
        releases = may & self.is_release
        only_releases = late & releases.any(axis=-1, keepdims=True)
        fading = mx.where(only_releases, releases, releases | (may & in_time))
        return mx.where(fading.any(axis=-1, keepdims=True), fading, may & ~self.is_end)

    def _cramped(self, played: Played) -> mx.array:
        """`[B]` bool: the room that is left is needed for the end."""
        return played.tokens + played.sounding.sum(axis=-1) >= self.limits.room - ENDING_TOKENS

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
