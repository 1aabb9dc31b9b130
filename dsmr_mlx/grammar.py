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
RELEASE_TICKS, RELEASE_TOKENS = 300, 64  # how long the last notes may ring on after a limit


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

    may_end: whether the model may end the piece earlier by itself
    """

    ticks: int = NEVER
    tokens: int = NEVER
    may_end: bool = False


class GrammarWalk:
    """The grammar of a tokenizer, as MLX tables, and the limits of what is to be played."""

    def __init__(self, tokenizer: Tokenizer, limits: Limits):
        grammar = tokenizer.grammar() or permissive_grammar(tokenizer)
        if limits.ticks < NEVER and not grammar.ticks.any():
            raise UserError(f"tokenizer {tokenizer.kind!r}: its tokens have no known duration, give a number of tokens")
        self.limits = limits
        self.start = grammar.start
        self.eos_id, self.pad_id = tokenizer.eos_id, tokenizer.pad_id
        self.tables = grammar
        self.last_tick = min(limits.ticks, NEVER - RELEASE_TICKS) + RELEASE_TICKS
        self.last_token = min(limits.tokens, NEVER - RELEASE_TOKENS) + RELEASE_TOKENS
        self.allowed_after = mx.array(grammar.allowed)  # (Q, V)
        self.next_state = mx.array(grammar.next_state)  # (V,)
        self.ticks = mx.array(grammar.ticks)
        self.velocity = mx.array(grammar.velocity)
        self.press, self.release = mx.array(grammar.press), mx.array(grammar.release)
        self.is_press, self.is_release = self.press >= 0, self.release >= 0
        self.is_end = mx.arange(tokenizer.vocab_size) == self.eos_id
        self.is_pad = mx.arange(tokenizer.vocab_size) == self.pad_id

    def begin(self, ids: np.ndarray) -> Played:
        """One lane that has played `ids` `[T]` (BOS and other specials have no effect); its clock starts now."""
        g = self.tables
        events = [i for i in np.asarray(ids, np.int64) if i not in (self.pad_id, self.eos_id) and self._is_event(i)]
        sounding, velocity = np.zeros(PITCHES, bool), -1
        for i in events:
            if g.press[i] >= 0:
                sounding[g.press[i]] = True
            if g.release[i] >= 0:
                sounding[g.release[i]] = False
            if g.velocity[i] >= 0:
                velocity = int(g.velocity[i])
        state = int(g.next_state[events[-1]]) if events else self.start
        lane = (mx.array([value], mx.int32) for value in (state, velocity, 0, 0))
        state, velocity, ticks, tokens = lane
        return Played(state, mx.array(sounding)[None], velocity, ticks, tokens)

    def _is_event(self, i: int) -> bool:
        g = self.tables
        return bool(g.press[i] >= 0 or g.release[i] >= 0 or g.velocity[i] >= 0 or g.ticks[i] > 0)

    def allowed(self, played: Played) -> mx.array:
        """`[B, V]` bool: the ids that may come next; at least one in every lane, PAD alone after the end."""
        sounding = played.sounding  # (B, 128)
        silent_key = mx.where(self.is_press, ~sounding[:, mx.maximum(self.press, 0)], True)
        sounding_key = mx.where(self.is_release, sounding[:, mx.maximum(self.release, 0)], True)
        new_velocity = (self.velocity < 0) | (self.velocity != played.velocity[:, None])
        may = self.allowed_after[played.state] & silent_key & sounding_key & new_velocity
        silence = ~sounding.any(axis=-1, keepdims=True)
        going_on = may & ~self.is_end | (may & silence if self.limits.may_end else False)
        over = (played.ticks >= self.limits.ticks) | (played.tokens >= self.limits.tokens)
        may_now = mx.where(over[:, None], mx.where(silence, self.is_end, self._fading(may, played)), going_on)
        ended = ~self.allowed_after[played.state].any(axis=-1, keepdims=True)
        return mx.where(ended, self.is_pad, may_now)

    def _fading(self, may: mx.array, played: Played) -> mx.array:
        """Of what may come while keys still sound: releases and pauses, and after a while only releases."""
        late = (played.ticks >= self.last_tick) | (played.tokens >= self.last_token)
        releases, pauses = may & self.is_release, may & (self.ticks > 0)
        only_releases = late[:, None] & releases.any(axis=-1, keepdims=True)
        fading = mx.where(only_releases, releases, releases | pauses)
        return mx.where(fading.any(axis=-1, keepdims=True), fading, may & ~self.is_end)

    def advance(self, played: Played, tokens: mx.array) -> Played:
        """What has been played after one more token `[B]` in each lane."""
        keys = mx.arange(PITCHES)
        pressed = keys == self.press[tokens][:, None]
        released = keys == self.release[tokens][:, None]
        velocity = self.velocity[tokens]
        ended = tokens == self.pad_id
        return Played(
            state=mx.where(ended, played.state, self.next_state[tokens]),
            sounding=(played.sounding | pressed) & ~released,
            velocity=mx.where(velocity >= 0, velocity, played.velocity),
            ticks=played.ticks + self.ticks[tokens],
            tokens=played.tokens + 1,
        )


def permissive_grammar(tokenizer: Tokenizer) -> Grammar:
    """For a tokenizer that has no grammar: any id but PAD and BOS may come at any time, until the end."""
    ids = np.arange(tokenizer.vocab_size)
    may = (ids != tokenizer.pad_id) & (ids != tokenizer.bos_id)
    nothing = np.full(len(ids), -1, np.int32)
    return Grammar(
        allowed=np.stack([may, np.zeros_like(may)]),
        next_state=(ids == tokenizer.eos_id).astype(np.int32),
        press=nothing,
        release=nothing,
        ticks=np.zeros(len(ids), np.int32),
        velocity=nothing,
        start=0,
        seconds_per_tick=0.01,
        states=("PIECE", "END"),
    )
