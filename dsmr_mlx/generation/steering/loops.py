"""A penalty on continuing a cycle of events that repeats itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.generation.grammar import GrammarState
from dsmr_mlx.generation.steering.base import Steering, at_token, per_lane, presses
from dsmr_mlx.tokenizers.event_grammar import Moment, beginning
from dsmr_mlx.tokenizers.token_tables import NEVER, TokenTables


class Recent(NamedTuple):
    """The last C tokens, and how they repeat."""

    tokens: mx.array  # (1, C) int32, newest first, −1 before the first
    quiet: mx.array  # (1,) int32, tokens since the last one that pressed a key; C if that is unknown
    runs: mx.array  # (1, C) int32; [c − 1]: how many of the last tokens equal the one c before them
    press: mx.array  # (1, V) bool, ids that press a key
    cycles: mx.array  # (1, C) int32, 1 … C


@dataclass(frozen=True)
class LoopPenalty(Steering):
    """Loops cost `penalty` nats, more with each repetition.

    The music is in a loop of c tokens, 1 ≤ c ≤ `max_cycle`, if the last k · c tokens are k ≥ `copies` times the same c
    tokens, at least one of which presses a key. Then the token that continues the loop, the one c tokens back, loses
    `penalty` · (k − `copies` + 1) nats. If several loops have the same next token, the most expensive one counts. Only
    exact repetition is a loop, with pauses and velocities; a repeated pitch or chord is not. The prompt counts too. If
    the vocabulary's pitches are unknown, every cycle is a loop.
    """

    penalty: float = 1.0
    max_cycle: int = 64
    copies: int = 2

    stage = "repetition"
    remembers: ClassVar = {"tokens": (-1, None), "quiet": (0, NEVER), "runs": (0, NEVER)}

    def __post_init__(self) -> None:
        self.check_types()
        self.require("penalty", self.penalty >= 0, "0 or more")
        self.require("max_cycle", 1 <= self.max_cycle <= 4096, "from 1 to 4096")
        self.require("copies", self.copies >= 2, "at least 2")

    def begin(self, tables: TokenTables, ids: np.ndarray) -> Recent:
        """See `Processor.begin`."""
        press = presses(tables)
        blank = Recent(
            tokens=per_lane(np.full(self.max_cycle, -1), mx.int32),
            quiet=per_lane(self.max_cycle, mx.int32),
            runs=per_lane(np.zeros(self.max_cycle), mx.int32),
            press=per_lane(press if press.any() else np.ones_like(press)),
            cycles=per_lane(np.arange(1, self.max_cycle + 1), mx.int32),
        )
        return self.read(tables, blank, ids, [beginning(tables.grammar)])

    def __call__(self, logits: mx.array, music: GrammarState, state: Recent) -> mx.array:
        copies = state.runs // state.cycles + 1  # (B, C)
        sounds = state.quiet[:, None] < state.cycles
        excess = mx.where(sounds, mx.maximum(copies - self.copies + 1, 0), 0)
        # Before the first token there is no excess, and −1 changes nothing.
        lowered = mx.take_along_axis(logits, state.tokens, axis=1) - self.penalty * excess.astype(mx.float32)
        return logits.at[lane_numbers(len(logits)), state.tokens].minimum(lowered)

    def advance(self, state: Recent, token: mx.array, music: GrammarState) -> Recent:
        """See `Processor.advance`."""
        return state._replace(
            tokens=mx.concatenate([token.astype(mx.int32)[:, None], state.tokens[:, :-1]], axis=1),
            quiet=mx.where(at_token(state.press, token), 0, state.quiet + 1),
            runs=mx.where(state.tokens == token[:, None], state.runs + 1, 0),
        )

    def read(self, tables: TokenTables, state: Recent, ids: np.ndarray, before: Sequence[Moment]) -> Recent:
        """See `Steering.read`."""
        ids, C = np.asarray(ids, np.int64), self.max_cycle
        rows = (np.array(array) for array in (state.tokens, state.quiet, state.runs, state.press))
        lanes = []
        for tokens, quiet, runs, press in zip(*rows, strict=True):
            seen = np.append(tokens[::-1], ids)  # oldest first: C tokens of the state, then T ids
            same = (trailing(ids == seen[C - c : len(seen) - c]) for c in range(1, C + 1))  # ids against those c before
            runs = [n + run if n == len(ids) else n for n, run in zip(same, runs, strict=True)]
            n = trailing(~press[ids])
            lanes.append((seen[::-1][:C], n + quiet if n == len(ids) else n, runs))
        tokens, quiet, runs = (mx.array(np.array(column), mx.int32) for column in zip(*lanes, strict=True))
        return state._replace(tokens=tokens, quiet=quiet, runs=runs)


@cache
def lane_numbers(n: int) -> mx.array:
    """0 … n − 1, int32 `(n, 1)`, as a constant."""
    return mx.array(np.arange(n, dtype=np.int32)[:, None])


def trailing(true: np.ndarray) -> int:
    """The number of true values at the end of `true` `(T,)` bool."""
    breaks = np.flatnonzero(~true)
    return len(true) - (breaks[-1] + 1 if len(breaks) else 0)
