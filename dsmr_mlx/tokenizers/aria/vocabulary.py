"""The meanings of the ids in the three vocabularies of Aria's published weights. NumPy only.

Ids are consecutive, in blocks: special ids, prefixes, notes by instrument, drums, durations, onsets, and the additions
of later weights: the pedal, and the end of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from dsmr_mlx.common.errors import UserError

BOS, EOS, PAD, UNKNOWN, ENDING, TIME_STEP = range(6)  # Aria's <S>, <E>, <P>, <U>, <D>, <T>
INSTRUMENTS = (*("piano", "organ", "guitar", "bass", "strings", "ensemble", "brass", "reed", "pipe", "synth_lead"),)
COMPOSERS = (
    *("bach", "beethoven", "mozart", "chopin", "rachmaninoff", "liszt"),
    *("debussy", "schubert", "brahms", "ravel", "satie", "scarlatti"),
)
FORMS = ("sonata", "prelude", "nocturne", "étude", "waltz", "mazurka", "impromptu", "fugue")
GENRES = ("jazz", "classical")
# General MIDI has sixteen groups of eight programs; −1: groups that the vocabularies leave out.
INSTRUMENT_OF_GROUP = np.array([0, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9, -1, -1, -1, -1, -1])
PROGRAM_OF_INSTRUMENT = (0, 16, 24, 32, 40, 48, 56, 64, 73, 80)

STEP_MS, SEGMENT_MS = 10, 5000
VELOCITIES, DURATIONS, ONSETS = 13, 501, 500  # grids of 0, 10, 20, …
LOWEST_DRUM, HIGHEST_DRUM = 35, 81
PITCHES = 128
NOTES = PITCHES * VELOCITIES  # ids of one instrument


@dataclass(frozen=True)
class AriaVocabulary:
    """The first id of each block of a vocabulary with `size` ids; `None` for blocks that it lacks.

    instruments: their number; composers: the first prefix of a composer, followed by forms and genres; notes: the first
    note of the piano; pedal: the pedal goes down, and the id after it up; prompt_end: Aria's <X>
    """

    size: int
    instruments: int
    composers: int | None
    notes: int
    drums: int | None
    durations: int
    onsets: int
    pedal: int | None
    prompt_end: int | None

    @classmethod
    def of(cls, instruments: int, labels: bool, drums: bool, pedal: bool, prompt_end: bool) -> AriaVocabulary:
        """Return a vocabulary with this number of instruments and these blocks; labels: composers, forms and genres."""
        at, first = 6, {}
        blocks = {
            "prefixes": instruments + drums,
            "composers": labels * (len(COMPOSERS) + len(FORMS) + len(GENRES)),
            "notes": instruments * NOTES,
            "drums": drums * (HIGHEST_DRUM - LOWEST_DRUM + 1),
            "durations": DURATIONS,
            "onsets": ONSETS,
            "pedal": 2 * pedal,
            "prompt_end": int(prompt_end),
        }
        for name, length in blocks.items():
            first[name] = at if length else None
            at += length
        del first["prefixes"]
        return cls(at, instruments, **first)

    def prefix(self, kind: str, name: str) -> int:
        """Return the id of an instrument, drum, composer, form or genre. Raises `UserError` for an unknown one."""
        labels = {"composer": COMPOSERS, "form": FORMS, "genre": GENRES}
        if kind == "instrument":
            known, first = (*INSTRUMENTS[: self.instruments], *(("drum",) if self.drums else ())), 6
        else:
            known = labels[kind] if self.composers else ()
            first = (self.composers or 0) + sum(len(labels[k]) for k in list(labels)[: list(labels).index(kind)])
        if name.lower() not in known:
            expected = f"expected one of {', '.join(known)}" if known else f"this vocabulary has no {kind}s"
            raise UserError(f"`{kind}` {name}: {expected}")
        return first + known.index(name.lower())

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The names of the ids, in order."""
        instruments, drums = INSTRUMENTS[: self.instruments], self.drums is not None
        return (
            *("<S>", "<E>", "<P>", "<U>", "<D>", "<T>"),
            *(f"Prefix_{name}" for name in (*instruments, *(["drum"] * drums))),
            *(f"Prefix_{name}" for name in (*COMPOSERS, *FORMS, *GENRES) if self.composers),
            *(f"{name}_{p}.{10 * v}" for name in instruments for p in range(PITCHES) for v in range(VELOCITIES)),
            *(f"drum_{p}" for p in range(LOWEST_DRUM, HIGHEST_DRUM + 1) if drums),
            *(f"Duration_{STEP_MS * i}" for i in range(DURATIONS)),
            *(f"Onset_{STEP_MS * i}" for i in range(ONSETS)),
            *(name for name in ("Pedal_down", "Pedal_up") if self.pedal),
            *(name for name in ("<X>",) if self.prompt_end),
        )

    def note_fields(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return instrument, pitch and velocity step `(T,)` of ids `(T,)`; the instrument of other ids is −1."""
        place = np.asarray(ids, np.int64) - self.notes
        is_note = (place >= 0) & (place < self.instruments * NOTES)
        place = np.where(is_note, place, 0)
        return np.where(is_note, place // NOTES, -1), place % NOTES // VELOCITIES, place % VELOCITIES

    def index(self, block: str, ids: np.ndarray) -> np.ndarray:
        """Return the places `(T,)` of ids in "durations", "onsets", "drums" or "pedal"; −1 for other ids."""
        lengths = {"durations": DURATIONS, "onsets": ONSETS, "drums": HIGHEST_DRUM - LOWEST_DRUM + 1, "pedal": 2}
        first = getattr(self, block)
        place = np.asarray(ids, np.int64) - (self.size if first is None else first)
        return np.where((place >= 0) & (place < lengths[block]), place, -1)

    @property
    def is_prefix(self) -> np.ndarray:
        """`(V,)` bool: the ids before <S>."""
        ids = np.arange(self.size)
        return (ids > TIME_STEP) & (ids < self.notes)


SETTINGS = {
    17_727: {"instruments": 10, "labels": True, "drums": True, "pedal": False, "prompt_end": False},
    17_729: {"instruments": 10, "labels": True, "drums": True, "pedal": True, "prompt_end": False},
    2_675: {"instruments": 1, "labels": False, "drums": False, "pedal": True, "prompt_end": True},
}
SIZES = tuple(SETTINGS)


@cache
def vocabulary_of(size: int) -> AriaVocabulary:
    """Return the vocabulary with `size` ids, one of `SIZES`; the number of rows of an embedding identifies it."""
    return AriaVocabulary.of(**SETTINGS[size])
