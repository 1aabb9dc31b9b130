"""The next token of each lane: grammar mask, processors and draw in one step that never leaves MLX."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from dsmr_mlx.generation.grammar import Bounds, GrammarState, GrammarWalk
from dsmr_mlx.generation.sampling import Processor, Sampler, Sampling, keys_at
from dsmr_mlx.model.compiled import Compiled

NO_TOKEN = -1  # drawn if the logits are NaN
CHUNK = 4096  # ids that processors with a `read` get at once
EVAL_EVERY = 32  # tokens between two evaluations if ids are read one by one


class TokenOrigin(Enum):
    """Where a token comes from. New music begins after the prompt. What is read later is part of the new music and
    may follow an end. What is shown, from FILL to PLAY, is read too but not part of the music.
    """

    PROMPT = 0
    READ = 1
    DRAWN = 2
    SHOWN = 3


class DecodeState(NamedTuple):
    """The decoding state besides the logits: a tree of arrays whose first axis is the lanes."""

    music: GrammarState
    processors: Any

    @property
    def lanes(self) -> int:
        """The number of lanes."""
        return len(self.music.state)

    def take(self, lanes: Sequence[int]) -> "DecodeState":
        """The state with these lanes, in this order; a lane may be taken several times."""
        index = mx.array(list(lanes), mx.int32)
        return tree_map(lambda array: mx.take(array, index, axis=0), self)

    @classmethod
    def joined(cls, states: Sequence["DecodeState"]) -> "DecodeState":
        """The lanes of several states, in this order."""
        return tree_map(lambda *arrays: mx.concatenate(arrays), states[0], *states[1:])


class NextToken:
    """Draws the next token and keeps the decoding state up to date; it holds no state itself.

    `step` is `_step`, compiled if wanted. Raises `UserError` for invalid processors.
    """

    def __init__(
        self, walk: GrammarWalk, sampling: Sampling, processors: Sequence[Processor | Callable], compiled: bool
    ):
        self.walk = walk
        self.sampler = Sampler(walk, sampling, processors)
        self.step = Compiled(self._step, compiled, lazy=True)
        self._advance = Compiled(self._followed, compiled, lazy=True)

    def begin(self, ids: np.ndarray) -> DecodeState:
        """The state of one lane after the prompt `ids` `(T,)`. Raises `UserError` as `Sampler.begin` does.

        What is shown is left out here, so that it has no effect on processors either.
        """
        ids = self.walk.tokenizer.without_shown(ids)
        return DecodeState(self.walk.begin(ids), self.sampler.begin(ids))

    def _step(
        self, logits: mx.array, state: DecodeState, keys: mx.array, position: mx.array, bounds: Bounds
    ) -> tuple[mx.array, DecodeState]:
        """A token `(B,)` int32 for each lane, `NO_TOKEN` if its logits `(B, V)` are NaN, and the state after it.

        keys `(B, 2)` and position, a uint32 scalar: see `keys_at`.
        """
        possible = self.walk.possible(logits, state.music, bounds)
        kept = self.walk.kept(state.music, bounds)
        token = self.sampler.sample(possible, state.music, state.processors, keys_at(keys, position), kept)
        drawn = mx.take_along_axis(possible, token[:, None], axis=-1)[:, 0]
        token = mx.where(drawn > -mx.inf, token.astype(mx.int32), NO_TOKEN)  # false for NaN too
        music = self.walk.advance(state.music, token)
        return token, DecodeState(music, self.sampler.advance(state.processors, token, music))

    def read(self, state: DecodeState, ids: np.ndarray, origin: TokenOrigin = TokenOrigin.READ) -> DecodeState:
        """The state after all lanes have read `ids` `(T,)`, none of them PAD, BOS, EOS or shown; evaluated.

        In chunks if every processor has a `read`, else token by token. origin: READ, or PROMPT if new music begins
        after them.
        """
        if not self.sampler.reads:
            for count, token in enumerate(ids.tolist(), start=1):
                state = self.follow(state, mx.array([token]), origin)
                if count % EVAL_EVERY == 0:
                    mx.eval(state)
        else:
            for start in range(0, len(ids), CHUNK):
                chunk, before = ids[start : start + CHUNK], self.walk.reopened(state.music).moments()
                processors = self.sampler.read(state.processors, chunk, before)
                state = DecodeState(self.walk.read(state.music, chunk), processors)
        if origin is TokenOrigin.PROMPT:
            state = state._replace(music=state.music._replace(prompt_ticks=state.music.ticks))
        mx.eval(state)
        return state

    def follow(self, state: DecodeState, token: mx.array, origin: TokenOrigin) -> DecodeState:
        """The state after one known token, `(1,)` for all lanes or `(B,)`; the same as `step` or `begin` gave.

        PAD, BOS and EOS change the grammar state only if they were drawn; processors see them in any case. What is
        shown changes nothing.
        """
        if origin is TokenOrigin.SHOWN:
            return state
        token, drawn = mx.broadcast_to(token, (state.lanes,)), origin is TokenOrigin.DRAWN
        ignored = np.zeros(state.lanes, bool) if drawn else np.isin(np.array(token), self.walk.specials)
        return self._advance(state, token, *map(mx.array, (drawn, origin is TokenOrigin.PROMPT, ignored)))

    def _followed(
        self, state: DecodeState, token: mx.array, drawn: mx.array, prompt: mx.array, ignored: mx.array
    ) -> DecodeState:
        before = state.music
        start = GrammarState(*(mx.where(drawn, *pair) for pair in zip(before, self.walk.reopened(before), strict=True)))
        music = self.walk.advance(start, token)
        music = music._replace(prompt_ticks=mx.where(prompt, music.ticks, music.prompt_ticks))
        music = GrammarState(*(where_lanes(ignored, *pair) for pair in zip(before, music, strict=True)))
        return DecodeState(music, self.sampler.advance(state.processors, token, music))


def where_lanes(chosen: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """`a` `(B, …)` in the lanes that are chosen, `(B,)`, and `b` in the others."""
    return mx.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b)
