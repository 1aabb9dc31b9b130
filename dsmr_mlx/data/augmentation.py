"""Augmentation of pieces while training: transposed, played a little faster or slower, softer or louder.

The recipe is that of Huang et al. 2018, "Music Transformer" (arXiv 1809.04281, for the Piano-e-Competition data):
−3 … +3 semitones and times multiplied by 0.95, 0.975, 1, 1.025 or 1.05, drawn uniformly; the shift of the velocity
is added here. A piece is changed as a whole and as notes, so every tokenizer serves.

What a piece becomes is a pure function of (seed, epoch, piece), in the first epoch too: a stream that is taken
up in the middle of a piece goes on with the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dsmr_mlx.common.config import Config
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.notes import DRUMS, Notes
from dsmr_mlx.tokenizers.base import Tokenizer

PIANO = (21, 108)  # the lowest and the highest key
MIDI = (0, 127)

Option = TypeVar("Option")


@dataclass(frozen=True, kw_only=True)
class Augmentation(Config):
    """How far a piece may be changed; 0 leaves that side of it as it is, and the defaults change nothing.

    transpose: semitones up or down; stretch: the largest relative change of all times, 0.05 for factors from
    0.95 to 1.05; velocity: MIDI velocity up or down. Tokens know velocities in steps (of 4 in the performance
    vocabulary), so shifts below that may change nothing.
    """

    transpose: int = 0
    stretch: float = 0.0
    velocity: int = 0

    def __post_init__(self) -> None:
        self.check_types()
        self.require("transpose", 0 <= self.transpose <= 127, "0 to 127 semitones")
        # From a half on, strikes that are two ticks apart could meet in one, see `augment`.
        self.require("stretch", 0 <= self.stretch <= 0.4, "0 to 0.4")
        self.require("velocity", 0 <= self.velocity <= 126, "0 to 126")

    @property
    def factors(self) -> tuple[float, ...]:
        """What times may be multiplied by: five values, evenly spaced, as in the paper."""
        half = self.stretch / 2
        return (1 - self.stretch, 1 - half, 1.0, 1 + half, 1 + self.stretch)


@dataclass(frozen=True)
class Draw:
    """What is done to one piece.

    semitones: added to all pitches but those of drums; factor: of all times; velocity: added, MIDI units.
    """

    semitones: int = 0
    factor: float = 1.0
    velocity: int = 0

    def apply(self, notes: Notes) -> Notes:
        """Transposed, stretched about the first onset; velocities are clipped to 1..127, pitches must fit."""
        if not len(notes):
            return notes
        start = notes.onset[0]
        semitones = self.semitones if notes.program is None else np.where(notes.program == DRUMS, 0, self.semitones)
        return Notes(
            start + (notes.onset - start) * self.factor,
            start + (notes.offset - start) * self.factor,
            notes.pitch.astype(np.int64) + semitones,
            np.clip(notes.velocity.astype(np.int64) + self.velocity, 1, 127),
            notes.program,
        )


def draw(augmentation: Augmentation, seed: int, epoch: int, piece: int, low: int, high: int) -> Draw:
    """What to do in an epoch to a piece whose pitches lie in low..high: a pure function, uniform in each part.

    The transposition is drawn among those that lose no note: all pitches stay on the piano's keys, or within
    0..127 if the piece itself leaves the piano. Each part has random bits of its own: to turn one on or off
    does not change what is drawn for the others. Seed, epoch and piece are 0 or more.
    """
    bottom, top = PIANO if PIANO[0] <= low <= high <= PIANO[1] else MIDI
    down, up = min(augmentation.transpose, low - bottom), min(augmentation.transpose, top - high)
    # Not a Generator: NumPy may change what those draw, and a run may be resumed with another NumPy.
    words = np.random.SeedSequence(seed, spawn_key=(epoch, piece)).generate_state(3, np.uint64).tolist()
    return Draw(
        _pick(words[0], range(-down, up + 1)),
        _pick(words[1], augmentation.factors),
        _pick(words[2], range(-augmentation.velocity, augmentation.velocity + 1)),
    )


def _pick(word: int, options: Sequence[Option]) -> Option:
    """One of some options, by 64 random bits."""
    return options[word * len(options) >> 64]


def augment(
    tokenizer: Tokenizer, ids: np.ndarray, augmentation: Augmentation, seed: int, epoch: int, piece: int
) -> np.ndarray:
    """The ids (T′,) of a piece as it is played in an epoch, from its ids (T,) in the corpus.

    Both have BOS first and EOS last and the tokenizer's dtype. T′ is not T in general: other times need other tokens.
    The same array comes back when there is nothing to do: all is off, the draw changes nothing, no note; and where a
    vocabulary cannot say what the piece would become, because it would last too long.

    Times are rounded to the tokenizer's grid again; with the performance vocabulary an onset moves by at most
    5 ms, and one kind of note is lost: of two strikes of one pitch in neighbouring ticks of 10 ms that a factor
    below 1 puts into the same tick, the earlier.
    """
    if augmentation == Augmentation():
        return ids
    notes = tokenizer.decode(ids)
    if not len(notes):
        return ids
    pitch = notes.pitch if notes.program is None else notes.pitch[notes.program != DRUMS]
    low, high = (int(pitch.min()), int(pitch.max())) if len(pitch) else MIDI
    change = draw(augmentation, seed, epoch, piece, low, high)
    try:
        return ids if change == Draw() else tokenizer.encode_notes(change.apply(notes))
    except UserError:
        return ids
