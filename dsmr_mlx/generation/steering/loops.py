"""A penalty on continuing a cycle of events that repeats itself."""

from collections.abc import Sequence
from dataclasses import dataclass
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
    presses: mx.array  # (1, C) bool, which of them press a key
    runs: mx.array  # (1, C) int32; [c − 1]: how many of the last tokens equal the one c before them
    press: mx.array  # (1, V) bool, ids that press a key


@dataclass(frozen=True)
class LoopPenalty(Steering):
    """Loops cost `penalty` nats, more with each repetition.

    The music is in a loop of c tokens, 1 ≤ c ≤ `max_cycle`, if the last k · c tokens are k ≥ `copies` times the same c
    tokens, at least one of which presses a key. Then the token that continues the loop, the one c tokens back, loses
    `penalty` · (k − `copies` + 1) nats. If several loops have the same next token, the most expensive one counts. Only
    exact repetition is a loop, with pauses and velocities; a repeated pitch or chord is not. Prompts count. If the
    vocabulary's pitches are unknown, every cycle is a loop.
    """

    penalty: float = 1.0
    max_cycle: int = 64
    copies: int = 2

    stage = "repetition"
    remembers: ClassVar = {"tokens": (-1, None), "presses": (False, True), "runs": (0, NEVER)}

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
            presses=per_lane(np.zeros(self.max_cycle, bool)),
            runs=per_lane(np.zeros(self.max_cycle), mx.int32),
            press=per_lane(press if press.any() else np.ones_like(press)),
        )
        return self.read(tables, blank, ids, [beginning(tables.grammar)])

    def __call__(self, logits: mx.array, music: GrammarState, state: Recent) -> mx.array:
        cycles = mx.arange(1, self.max_cycle + 1)
        copies = state.runs // cycles + 1  # (B, C)
        sounds = mx.cumsum(state.presses.astype(mx.int32), axis=-1) > 0
        excess = mx.where(sounds, mx.maximum(copies - self.copies + 1, 0), 0)
        lanes = mx.arange(len(logits))[:, None]
        worst = mx.zeros(logits.shape).at[lanes, mx.maximum(state.tokens, 0)].maximum(excess.astype(mx.float32))
        return logits - self.penalty * worst

    def advance(self, state: Recent, token: mx.array, music: GrammarState) -> Recent:
        """See `Processor.advance`."""

        def shifted(values: mx.array, first: mx.array) -> mx.array:
            return mx.concatenate([first[:, None], values[:, :-1]], axis=1)

        return state._replace(
            tokens=shifted(state.tokens, token.astype(mx.int32)),
            presses=shifted(state.presses, at_token(state.press, token)),
            runs=mx.where(state.tokens == token[:, None], state.runs + 1, 0),
        )

    def read(self, tables: TokenTables, state: Recent, ids: np.ndarray, before: Sequence[Moment]) -> Recent:
        """See `Steering.read`."""
        ids, C = np.asarray(ids, np.int64), self.max_cycle
        rows = (np.array(array) for array in (state.tokens, state.presses, state.runs, state.press))
        lanes = []
        for tokens, pressed, runs, press in zip(*rows, strict=True):
            seen = np.append(tokens[::-1], ids)  # oldest first: C tokens of the state, then T ids
            same = (trailing(ids == seen[C - c : len(seen) - c]) for c in range(1, C + 1))  # ids against those c before
            runs = [n + run if n == len(ids) else n for n, run in zip(same, runs, strict=True)]
            lanes.append((seen[::-1][:C], np.append(pressed[::-1], press[ids])[::-1][:C], runs))
        tokens, pressed, runs = (np.array(column) for column in zip(*lanes, strict=True))
        return state._replace(
            tokens=mx.array(tokens, mx.int32), presses=mx.array(pressed), runs=mx.array(runs, mx.int32)
        )


def trailing(true: np.ndarray) -> int:
    """The number of true values at the end of `true` `(T,)` bool."""
    breaks = np.flatnonzero(~true)
    return len(true) - (breaks[-1] + 1 if len(breaks) else 0)
