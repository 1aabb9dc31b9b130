"""Against loops: a penalty on going on with a cycle of events that has come round before."""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.grammar import Played
from dsmr_mlx.pieces import PieceTables
from dsmr_mlx.steering.base import Steering, at_token, per_lane, presses


class Recent(NamedTuple):
    """The last C tokens, and how they repeat themselves."""

    tokens: mx.array  # [1, C] int32, newest first, −1 where there was none
    presses: mx.array  # [1, C] bool, which of them press a key
    runs: mx.array  # [1, C] int32; c − 1: for how many tokens, up to the last, each has been the one c before it
    press: mx.array  # [1, V] bool, ids that press a key


@dataclass(frozen=True)
class LoopPenalty(Steering):
    """Loops cost `penalty` nats, more each time round.

    The music is in a loop of c tokens, 1 ≤ c ≤ `longest`, when the last k · c tokens are k ≥ `copies` times the
    same c tokens, at least one of which presses a key. Then the token that goes on with the loop, which is the one
    c tokens back, loses `penalty` · (k − `copies` + 1) nats. Of several loops with the same next token the one that
    costs most counts. Only what is repeated exactly is a loop, with its pauses and velocities; a single pitch or
    chord that comes again is none. Prompts count. In a vocabulary of unknown pitches every cycle is a loop.

    What is remembered is the last `longest` tokens and for each c how long the music has repeated itself.
    """

    penalty: float = 1.0
    longest: int = 64
    copies: int = 2

    stage = "repetition"

    def __post_init__(self) -> None:
        self.check_types()
        self.require("penalty", self.penalty >= 0, "0 or more")
        self.require("longest", 1 <= self.longest <= 4096, "from 1 to 4096")
        self.require("copies", self.copies >= 2, "at least 2")

    def begin(self, tables: PieceTables, ids: np.ndarray) -> Recent:
        ids = np.asarray(ids, np.int64)
        press = presses(tables)
        press = press if press.any() else np.ones_like(press)
        newest = ids[::-1][: self.longest]
        tokens, pressed = np.full(self.longest, -1), np.zeros(self.longest, bool)
        tokens[: len(newest)], pressed[: len(newest)] = newest, press[newest]
        runs = [trailing_run(ids, c) for c in range(1, self.longest + 1)]
        return Recent(per_lane(tokens, mx.int32), per_lane(pressed), per_lane(runs, mx.int32), per_lane(press))

    def __call__(self, logits: mx.array, played: Played, state: Recent) -> mx.array:
        cycles = mx.arange(1, self.longest + 1)
        copies = state.runs // cycles + 1  # (n, C)
        sounds = mx.cumsum(state.presses.astype(mx.int32), axis=-1) > 0
        excess = mx.where(sounds, mx.maximum(copies - self.copies + 1, 0), 0)
        lanes = mx.arange(len(logits))[:, None]
        worst = mx.zeros(logits.shape).at[lanes, mx.maximum(state.tokens, 0)].maximum(excess.astype(mx.float32))
        return logits - self.penalty * worst

    def advance(self, state: Recent, token: mx.array, played: Played) -> Recent:
        def shifted(values: mx.array, first: mx.array) -> mx.array:
            return mx.concatenate([first[:, None], values[:, :-1]], axis=1)

        return state._replace(
            tokens=shifted(state.tokens, token.astype(mx.int32)),
            presses=shifted(state.presses, at_token(state.press, token)),
            runs=mx.where(state.tokens == token[:, None], state.runs + 1, 0),
        )


def trailing_run(ids: np.ndarray, cycle: int) -> int:
    """For how many ids, up to the last of `ids` `[T]`, each is the id `cycle` before it."""
    same = ids[cycle:] == ids[:-cycle]
    breaks = np.flatnonzero(~same)
    return len(same) - (breaks[-1] + 1 if len(breaks) else 0)
