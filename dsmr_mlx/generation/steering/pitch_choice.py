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

CLASSES = 12
UNSEEN = 1 / 3  # of a note: added to the weight of each pitch class, so that none is 0


class Heard(NamedTuple):
    """How often each pitch class was pressed lately, and what follows from it for each id."""

    heard: mx.array  # (1, 12) float32, ln of the weight of each pitch class in the notes so far
    added: mx.array  # (1, V, 13) float32, ln of what an id adds to these weights, and what it adds to all of `heard`
    scores: mx.array  # (1, 12, V) float32, the nats that an id gains per nat of `heard`
    press: mx.array  # (1, V) bool, ids that press a key


@dataclass(frozen=True)
class PitchChoice(Steering):
    """How a key is chosen, once it is decided that a key is pressed: the probability of all such ids does not change.

    The probability p of an id that presses a key becomes p^(1 / `temperature`) · f^`tonality`, normalized among these
    ids, where f is the share of its pitch class in the notes so far, the prompt included; a note counts exp(−n /
    `notes`) when n notes have followed. For an id of several keys, f is the geometric mean of their shares.

    A temperature below 1 makes wrong notes rarer, while pauses stay as varied as they are, which a low temperature for
    all tokens or min-p takes away; it applies on top of that for all tokens. So do velocities and lengths, unless they
    are part of the same id, as velocities are in Aria's vocabularies. A tonality above 0 keeps to the key of the piece,
    as the pitch classes show it, similar to a cache of recent words (Kuhn & De Mori 1990). The defaults change nothing.
    """

    temperature: float = 1.0
    tonality: float = 0.0
    notes: float = 300.0

    remembers: ClassVar = {"heard": (-2.0, 20.0)}

    def __post_init__(self) -> None:
        self.check_types()
        self.require("temperature", self.temperature >= 0.01, "at least 0.01")
        self.require("notes", self.notes >= 1, "at least 1")

    def begin(self, tables: TokenTables, ids: np.ndarray) -> Heard:
        """See `Processor.begin`."""
        press, counts = presses(tables), by_class(tables.presses)
        self.require_events(press, "pitches")
        keys = counts.sum(axis=1, keepdims=True)
        fading = -keys / self.notes
        with np.errstate(divide="ignore"):
            added = np.log(counts - UNSEEN * np.expm1(fading))  # `UNSEEN` does not fade
        blank = Heard(
            heard=per_lane(np.full(CLASSES, np.log(UNSEEN)), mx.float32),
            added=per_lane(np.concatenate([added, fading], axis=1), mx.float32),
            scores=per_lane((self.tonality * counts / np.maximum(keys, 1)).T, mx.float32),
            press=per_lane(press),
        )
        return self.read(tables, blank, ids, ())

    def __call__(self, logits: mx.array, music: GrammarState, state: Heard) -> mx.array:
        changed = logits / self.temperature + (state.heard[:, None] @ state.scores)[:, 0]
        return reweighted(logits, state.press, changed)

    def advance(self, state: Heard, token: mx.array, music: GrammarState) -> Heard:
        """See `Processor.advance`."""
        added = at_token(state.added, token)
        return state._replace(heard=mx.logaddexp(state.heard + added[:, -1:], added[:, :-1]))

    def read(self, tables: TokenTables, state: Heard, ids: np.ndarray, before: Sequence[Moment]) -> Heard:
        """See `Steering.read`."""
        new = by_class(tables.presses[ids])  # (T, 12)
        later = new.sum() - np.cumsum(new.sum(axis=1))  # notes after each id
        earlier = np.exp(np.array(state.heard, np.float64)) - UNSEEN
        heard = np.exp(-new.sum() / self.notes) * earlier + np.exp(-later / self.notes) @ new + UNSEEN
        return state._replace(heard=mx.array(np.log(heard).astype(np.float32)))


def by_class(keys: np.ndarray) -> np.ndarray:
    """How many of the keys `(n, 128)` bool are of each pitch class, `(n, 12)` float64."""
    return keys @ np.eye(CLASSES)[np.arange(keys.shape[1]) % CLASSES]
