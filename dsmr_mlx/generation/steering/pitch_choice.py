"""A bias on which keys are pressed, among themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.generation.grammar import GrammarState
from dsmr_mlx.generation.steering.base import Steering, at_token, per_lane, presses, reweighted
from dsmr_mlx.tokenizers.event_grammar import Moment
from dsmr_mlx.tokenizers.token_tables import TokenTables

# Notes that are added to those heard, so that no share is 0: a third of each pitch class, 4 together.
UNSEEN = np.append(np.full(12, 1 / 3), 4.0)


class HeardClasses(NamedTuple):
    """How often each pitch class was pressed lately. C = 13: the pitch classes, and all together."""

    effects: mx.array  # (1, V, C + 1) float32, ln of what an id adds to the weights, and ln of the factor before that
    scores: mx.array  # (1, C, V) float32, what an id gains per nat of `heard`
    press: mx.array  # (1, V) bool, ids that press a key
    heard: mx.array  # (1, C) float32, ln of the weights of the notes so far, with `UNSEEN`


@dataclass(frozen=True)
class PitchChoice(Steering):
    """How a key is chosen, once it is decided that some key is pressed: when and how loudly it sounds does not change.

    The probability p of an id that presses a key becomes p^(1 / `temperature`) · f^`tonality`, normalized among these
    ids, where f is the share of its pitch class in the notes so far, the prompt included; a note counts exp(−n /
    `notes`) when n notes have followed. An id of several keys has the product of their shares.

    A temperature below 1 makes wrong notes rarer, while pauses and velocities stay as varied as they are, which a low
    temperature for all tokens or min-p takes away; it applies on top of that for all tokens. A tonality above 0 keeps
    to the key of the piece. It is a cache of recent words in the sense of Kuhn & De Mori 1990: the model's own memory
    says what comes next, the shares say in which key. The defaults change nothing.
    """

    temperature: float = 1.0
    tonality: float = 0.0
    notes: float = 300.0

    remembers: ClassVar = {"heard": (-2.0, 20.0)}

    def __post_init__(self) -> None:
        self.check_types()
        self.require("temperature", self.temperature >= 0.01, "at least 0.01")
        self.require("notes", self.notes >= 1, "at least 1")

    def begin(self, tables: TokenTables, ids: np.ndarray) -> HeardClasses:
        """See `Processor.begin`."""
        press, counts = presses(tables), by_class(tables.presses)
        self.require_events(press, "pitches")
        fading = -counts[:, -1:] / self.notes
        with np.errstate(divide="ignore"):
            added = np.log(counts - UNSEEN * np.expm1(fading))  # `UNSEEN` does not fade
        blank = HeardClasses(
            effects=per_lane(np.concatenate([added, fading], axis=1), mx.float32),
            scores=per_lane(self.tonality * counts.T * np.append(np.ones(12), -1.0)[:, None], mx.float32),
            press=per_lane(press),
            heard=per_lane(np.log(UNSEEN), mx.float32),
        )
        return self.read(tables, blank, ids, ())

    def __call__(self, logits: mx.array, music: GrammarState, state: HeardClasses) -> mx.array:
        changed = logits / self.temperature + (state.heard[:, None] @ state.scores)[:, 0]
        return reweighted(logits, state.press, changed)

    def advance(self, state: HeardClasses, token: mx.array, music: GrammarState) -> HeardClasses:
        """See `Processor.advance`."""
        effect = at_token(state.effects, token)
        return state._replace(heard=mx.logaddexp(state.heard + effect[:, -1:], effect[:, :-1]))

    def read(self, tables: TokenTables, state: HeardClasses, ids: np.ndarray, before: Sequence[Moment]) -> HeardClasses:
        """See `Steering.read`."""
        new = by_class(tables.presses[ids])  # (T, C)
        so_far = np.cumsum(new[:, -1])
        total = so_far[-1] if len(so_far) else 0
        before_ids = np.exp(np.array(state.heard, np.float64)) - UNSEEN
        heard = np.exp(-total / self.notes) * before_ids + np.exp((so_far - total) / self.notes) @ new + UNSEEN
        return state._replace(heard=mx.array(np.log(heard).astype(np.float32)))


def by_class(keys: np.ndarray) -> np.ndarray:
    """How many of the keys `(n, 128)` bool are of each pitch class, and how many there are, `(n, 13)` float64."""
    pitches = np.arange(keys.shape[1])[:, None] % 12
    return keys @ np.concatenate([pitches == np.arange(12), np.ones_like(pitches)], axis=1).astype(np.float64)
