"""Augment pieces during training: transpose them, change their tempo and their loudness, announce their end.

The recipe is that of Huang et al. 2018, "Music Transformer" (arXiv 1809.04281, for the Piano-e-Competition data):
−3 … +3 semitones and times multiplied by 0.95, 0.975, 1, 1.025 or 1.05, drawn uniformly. The velocity shift is added
here. Whole pieces are changed, as notes, so it works with every tokenizer.

The result is a pure function of (seed, epoch, piece), so a stream resumed in the middle of a piece continues with the
same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dsmr_mlx.common.config import Config
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.notes import DRUMS, Notes
from dsmr_mlx.tokenizers.base import Tokenizer

ANNOUNCED = range(90, 111)  # ids from the announcement to the end, as in Aria's training
ENDINGS = 0x656E6473  # separates these random bits from those of the other changes
PIANO = (21, 108)  # the lowest and the highest pitch
MIDI = (0, 127)

Option = TypeVar("Option")


@dataclass(frozen=True, kw_only=True)
class Augmentation(Config):
    """How far a piece may be changed. The defaults, all 0, change nothing.

    transpose: semitones up or down, 0 to 127
    stretch: the largest relative change of times, 0 to 0.4; 0.05 for factors from 0.95 to 1.05
    velocity: MIDI velocity up or down, 0 to 126; tokens store velocities in steps (of 4 in the performance
        vocabulary), so smaller shifts may change nothing
    """

    transpose: int = 0
    stretch: float = 0.0
    velocity: int = 0

    def __post_init__(self) -> None:
        self.check_types()
        self.require("transpose", 0 <= self.transpose <= 127, "0 to 127 semitones")
        # From 0.5 on, onsets two ticks apart could fall into the same tick, see `augment`.
        self.require("stretch", 0 <= self.stretch <= 0.4, "0 to 0.4")
        self.require("velocity", 0 <= self.velocity <= 126, "0 to 126")

    @property
    def factors(self) -> tuple[float, ...]:
        """The five factors that times may be multiplied by, evenly spaced, as in the paper."""
        half = self.stretch / 2
        return (1 - self.stretch, 1 - half, 1.0, 1 + half, 1 + self.stretch)


@dataclass(frozen=True)
class Draw:
    """The changes drawn for one piece.

    semitones: added to all pitches except those of drums; factor: multiplies all times; velocity: added, MIDI units.
    """

    semitones: int = 0
    factor: float = 1.0
    velocity: int = 0

    def apply(self, notes: Notes) -> Notes:
        """Return changed notes: stretched from the first onset on, velocities clipped to 1..127. Pitches must fit."""
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


def draw(
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    piece: int,
    low: int,
    high: int,
    vocabulary: tuple[int, int] = MIDI,
) -> Draw:
    """Draw the changes of a piece with pitches in low..high in an epoch: uniform, a pure function of the arguments.

    Transpositions that would lose notes are excluded: all pitches stay on the piano's keys, or within 0..127 if the
    piece itself leaves the piano, and within the lowest and highest pitch of the vocabulary. Each part has separate
    random bits, so turning one on or off does not change the others. Seed, epoch and piece must be 0 or more.
    """
    bottom, top = PIANO if PIANO[0] <= low <= high <= PIANO[1] else MIDI
    bottom, top = max(bottom, vocabulary[0]), min(top, vocabulary[1])
    down, up = (min(augmentation.transpose, max(room, 0)) for room in (low - bottom, top - high))
    # Not a Generator: its draws may differ between NumPy versions, and a run may be resumed with another version.
    words = np.random.SeedSequence(seed, spawn_key=(epoch, piece)).generate_state(3, np.uint64).tolist()
    return Draw(
        _pick(words[0], range(-down, up + 1)),
        _pick(words[1], augmentation.factors),
        _pick(words[2], range(-augmentation.velocity, augmentation.velocity + 1)),
    )


def _pick(word: int, options: Sequence[Option]) -> Option:
    """Return one of the options, chosen by 64 random bits."""
    return options[word * len(options) >> 64]


def augment(
    tokenizer: Tokenizer, ids: np.ndarray, augmentation: Augmentation, seed: int, epoch: int, piece: int
) -> np.ndarray:
    """Return the ids `(T′,)` of a piece in an epoch, from its ids `(T,)` in the corpus.

    Both start with BOS, end with EOS and have the tokenizer's dtype. T′ may differ from T, because other times need
    other tokens. The array itself is returned if the draw changes nothing, the piece has no notes, or the vocabulary
    cannot represent the changed piece because it lasts too long.

    Times are rounded to the tokenizer's grid again. With the performance vocabulary an onset moves by at most 5 ms. A
    note is lost only if a factor below 1 moves two onsets of one pitch into the same 10 ms tick: the earlier one.
    """
    if augmentation == Augmentation():
        return ids
    notes = tokenizer.decode(ids)
    if not len(notes):
        return ids
    pitch = notes.pitch if notes.program is None else notes.pitch[notes.program != DRUMS]
    low, high = (int(pitch.min()), int(pitch.max())) if len(pitch) else MIDI
    change = draw(augmentation, seed, epoch, piece, low, high, pitches_of(tokenizer))
    try:
        return ids if change == Draw() else tokenizer.changed(ids, change.apply)
    except UserError:
        return ids


def pitches_of(tokenizer: Tokenizer) -> tuple[int, int]:
    """The lowest and the highest pitch of a vocabulary; those of MIDI if its ids do not name pitches."""
    grammar = tokenizer.event_grammar()
    pitches = np.array(MIDI) if grammar is None else grammar.press[grammar.press >= 0]
    return (int(pitches.min()), int(pitches.max())) if len(pitches) else MIDI


def announce_end(tokenizer: Tokenizer, ids: np.ndarray, seed: int, epoch: int, piece: int) -> np.ndarray:
    """Return a piece in an epoch with its end announced, see `Tokenizer.with_announced_end`; ids: `(T,)`, augmented.

    The place is drawn from `ANNOUNCED`, a pure function of the other arguments. Validation has no announcements.
    """
    words = np.random.SeedSequence(seed, spawn_key=(epoch, piece, ENDINGS)).generate_state(1, np.uint64).tolist()
    return tokenizer.with_announced_end(ids, _pick(words[0], ANNOUNCED))
