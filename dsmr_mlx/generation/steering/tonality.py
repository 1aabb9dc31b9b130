"""Biases on which keys are pressed, among themselves: when, how loudly and for how long they sound is left alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from dsmr_mlx.generation.grammar import GrammarState
from dsmr_mlx.generation.steering.base import Steering, at_token, per_lane, presses, tilt
from dsmr_mlx.tokenizers.event_grammar import Moment
from dsmr_mlx.tokenizers.token_tables import TokenTables

CLASSES = 12
UNSEEN = 4.0  # notes, spread evenly over all pitch classes, that are added to those heard


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
        scores = logits * (1 / self.temperature - 1)
        return tilt(logits, state, mx.where(logits > -mx.inf, scores, 0.0))


class HeardClasses(NamedTuple):
    """How often each pitch class was pressed lately."""

    classes: mx.array  # (1, V, 12) float32, how many keys of each pitch class an id presses
    press: mx.array  # (1, V) bool, ids that press a key
    heard: mx.array  # (1, 12) float32, notes of each pitch class, an earlier one weighs less


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
        press = presses(tables)
        self.require_events(press, "pitches")
        blank = HeardClasses(
            per_lane(by_class(tables.presses), mx.float32), per_lane(press), per_lane(np.zeros(CLASSES), mx.float32)
        )
        return self.read(tables, blank, ids, ())

    def __call__(self, logits: mx.array, music: GrammarState, state: HeardClasses) -> mx.array:
        heard = state.heard + UNSEEN / CLASSES
        shares = mx.log(heard / heard.sum(axis=-1, keepdims=True))  # (B, 12)
        return tilt(logits, state.press, self.strength * (state.classes @ shares[:, :, None])[:, :, 0])

    def advance(self, state: HeardClasses, token: mx.array, music: GrammarState) -> HeardClasses:
        """See `Processor.advance`."""
        new = at_token(state.classes, token)
        return state._replace(heard=state.heard * mx.exp(-new.sum(axis=-1, keepdims=True) / self.notes) + new)

    def read(self, tables: TokenTables, state: HeardClasses, ids: np.ndarray, before: Sequence[Moment]) -> HeardClasses:
        """See `Steering.read`."""
        new = by_class(tables.presses[ids])  # (T, 12)
        notes = new.sum(axis=1)
        later = notes.sum() - np.cumsum(notes)  # notes after each id
        heard = np.exp(-notes.sum() / self.notes) * np.array(state.heard, np.float64)
        heard += (np.exp(-later / self.notes)[:, None] * new).sum(axis=0)
        return state._replace(heard=mx.array(heard.astype(np.float32)))


def by_class(keys: np.ndarray) -> np.ndarray:
    """How many of the keys `(…, 128)` bool are of each pitch class, `(…, 12)` int."""
    return np.stack([keys[..., c::CLASSES].sum(axis=-1) for c in range(CLASSES)], axis=-1)
