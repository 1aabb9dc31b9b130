"""Biases on which keys are pressed, among themselves: when, how loudly and for how long they sound is left alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.generation.grammar import GrammarState
from dsmr_mlx.generation.steering.base import Steering, at_token, per_lane, presses, reweighted, tilt
from dsmr_mlx.tokenizers.event_grammar import Moment
from dsmr_mlx.tokenizers.token_tables import TokenTables

# Notes that are added to those heard, so that no share is 0: a third of each pitch class, 4 together.
UNSEEN = np.append(np.full(12, 1 / 3), 4.0).astype(np.float32)


@dataclass(frozen=True)
class PitchTemperature(Steering):
    """The temperature of the choice between keys, below 1 more predictable; 1 changes nothing.

    The probabilities of ids that press a key are raised to 1 / `temperature`, and normalized: the probability that some
    key is pressed does not change. So wrong notes get rarer, while pauses and velocities stay as varied as they are,
    which a low temperature for all tokens or min-p takes away. It applies on top of the temperature of all tokens.
    """

    temperature: float

    def __post_init__(self) -> None:
        self.check_types()
        self.require("temperature", self.temperature >= 0.01, "at least 0.01")

    def begin(self, tables: TokenTables, ids: np.ndarray) -> mx.array:
        """See `Processor.begin`."""
        press = presses(tables)
        self.require_events(press, "pitches")
        return per_lane(press)

    def __call__(self, logits: mx.array, music: GrammarState, state: mx.array) -> mx.array:
        return reweighted(logits, state, logits / self.temperature)


class HeardClasses(NamedTuple):
    """How often each pitch class was pressed lately. C = 13: the pitch classes, and all together."""

    effects: mx.array  # (1, V, C + 1) float32, how many keys an id presses, and by how much earlier notes weigh less
    scores: mx.array  # (1, C, V) float32, what an id gains per nat of each class's weight; it loses that of all
    press: mx.array  # (1, V) bool, ids that press a key
    heard: mx.array  # (1, C) float32, the weights of the notes so far


@dataclass(frozen=True)
class Tonality(Steering):
    """Keeps to the pitch classes of the music so far, and thus to its key, by `strength`; 0 changes nothing.

    The probability of a key is multiplied by f^`strength` and normalized among the keys, where f is the share of its
    pitch class in the notes so far, the prompt included; a note counts exp(−n / `notes`) when n notes have followed.
    The probability that some key is pressed does not change. A cache of recent words in the sense of Kuhn & De Mori
    1990: the model's own memory says what comes next, this says in which key the piece is.
    """

    strength: float
    notes: float = 300.0

    remembers: ClassVar = {"heard": (0.0, 1e9)}

    def __post_init__(self) -> None:
        self.check_types()
        self.require("notes", self.notes >= 1, "at least 1")

    def begin(self, tables: TokenTables, ids: np.ndarray) -> HeardClasses:
        """See `Processor.begin`."""
        press, counts = presses(tables), by_class(tables.presses)
        self.require_events(press, "pitches")
        weighs = np.exp(-counts[:, -1:] / self.notes)
        blank = HeardClasses(
            effects=per_lane(np.concatenate([counts, weighs], axis=1), mx.float32),
            scores=per_lane(self.strength * counts.T * np.append(np.ones(12), -1.0)[:, None], mx.float32),
            press=per_lane(press),
            heard=per_lane(np.zeros(len(UNSEEN)), mx.float32),
        )
        return self.read(tables, blank, ids, ())

    def __call__(self, logits: mx.array, music: GrammarState, state: HeardClasses) -> mx.array:
        nats = mx.log(state.heard + mx.array(UNSEEN))  # (B, C)
        return tilt(logits, state.press, (nats[:, None] @ state.scores)[:, 0])

    def advance(self, state: HeardClasses, token: mx.array, music: GrammarState) -> HeardClasses:
        """See `Processor.advance`."""
        effect = at_token(state.effects, token)
        return state._replace(heard=state.heard * effect[:, -1:] + effect[:, :-1])

    def read(self, tables: TokenTables, state: HeardClasses, ids: np.ndarray, before: Sequence[Moment]) -> HeardClasses:
        """See `Steering.read`."""
        new = by_class(tables.presses[ids])  # (T, C)
        so_far = np.cumsum(new[:, -1])
        total = so_far[-1] if len(so_far) else 0
        heard = np.exp(-total / self.notes) * np.array(state.heard, np.float64)
        heard += np.exp((so_far - total) / self.notes) @ new
        return state._replace(heard=mx.array(heard.astype(np.float32)))


def by_class(keys: np.ndarray) -> np.ndarray:
    """How many of the keys `(n, 128)` bool are of each pitch class, and how many there are, `(n, 13)` float64."""
    pitches = np.arange(keys.shape[1])[:, None] % 12
    return keys @ np.concatenate([pitches == np.arange(12), np.ones_like(pitches)], axis=1).astype(np.float64)
