"""What a tokenizer makes of a piece: its tokens, how many of them, and what is lost when they become notes again."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Difference:
    """How far values are from what they were: mean and largest absolute difference."""

    mean: float
    max: float


@dataclass(frozen=True)
class RoundTrip:
    """Notes before and after. onset, offset: seconds; velocity: MIDI units; None where no note comes back.

    given, returned: how many notes; matched: how many have a counterpart of the same pitch and program
    """

    given: int
    returned: int
    matched: int
    onset: Difference | None
    offset: Difference | None
    velocity: Difference | None


@dataclass(frozen=True)
class TokenReport:
    """A piece as tokens, BOS and EOS among them.

    label, fingerprint, vocab_size: of the tokenizer; ids: the tokens; names: their names; notes, seconds: of the piece;
    events: how many ids of the base tokenizer the tokens stand for; types: how many of each type these are, the most
    frequent first; round_trip: what is lost
    """

    label: str
    fingerprint: str
    vocab_size: int
    ids: list[int]
    names: list[str]
    notes: int
    seconds: float
    events: int
    types: dict[str, int]
    round_trip: RoundTrip

    @property
    def per_note(self) -> float:
        """Tokens for each note."""
        return len(self.ids) / max(self.notes, 1)

    @property
    def per_second(self) -> float:
        """Tokens for each second of music."""
        return len(self.ids) / max(self.seconds, 1e-9)

    @property
    def compression(self) -> float:
        """Events for each token: 1 without subwords."""
        return self.events / len(self.ids)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        rates = {"per_note": self.per_note, "per_second": self.per_second, "compression": self.compression}
        return {"tokens": len(self.ids), **rates, **asdict(self)}


def report_tokens(tokenizer: Tokenizer, notes: Notes) -> TokenReport:
    """Encode notes and decode them again. UserError for what the vocabulary cannot say."""
    ids = tokenizer.encode_notes(notes)
    events = tokenizer.to_events(ids)
    names = tokenizer.event_names
    types = Counter(type_name(names[event]) for event in events)
    return TokenReport(
        label=tokenizer.label,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        ids=ids.tolist(),
        names=[tokenizer.tokens[i] for i in ids],
        notes=len(notes),
        seconds=notes.duration,
        events=len(events),
        types=dict(types.most_common()),
        round_trip=round_trip(notes, tokenizer.decode(ids)),
    )


def type_name(token: str) -> str:
    """`NOTE_ON_60` → `NOTE_ON`, `Duration_0.3.50` → `Duration`."""
    return token.rpartition("_")[0] or token


def round_trip(given: Notes, returned: Notes) -> RoundTrip:
    """What became of some notes: each is compared with the one of its pitch and program that begins next to it."""
    before, after = match(given, returned)
    values = (
        (given.onset[before], returned.onset[after]),
        (given.offset[before], returned.offset[after]),
        (given.velocity[before].astype(float), returned.velocity[after].astype(float)),
    )
    differences = [_difference(np.abs(b - a)) for a, b in values]
    return RoundTrip(len(given), len(returned), len(before), *differences)


def _difference(values: np.ndarray) -> Difference | None:
    return Difference(float(values.mean()), float(values.max())) if len(values) else None


def count_recovered(given: Notes, returned: Notes) -> int:
    """How many notes come back at any time: for each pitch and program as many as there are in both."""
    here, there = (np.bincount(_voices(notes), minlength=128 * 256) for notes in (given, returned))
    return int(np.minimum(here, there).sum())


def match(given: Notes, returned: Notes) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (M,) of notes of one and of the other that belong together: of one pitch and program, and each the one
    that begins nearest to the other.
    """
    pairs = [np.zeros((0, 2), np.int64)]
    voices, others = _voices(given), _voices(returned)
    for voice in np.intersect1d(voices, others):
        here, there = np.flatnonzero(voices == voice), np.flatnonzero(others == voice)
        nearest = _nearest(given.onset[here], returned.onset[there])
        back = _nearest(returned.onset[there], given.onset[here])
        mutual = back[nearest] == np.arange(len(here))
        pairs.append(np.stack([here[mutual], there[nearest[mutual]]], axis=1))
    before, after = np.concatenate(pairs).T
    return before, after


def _voices(notes: Notes) -> np.ndarray:
    """A number (N,) for each pitch of each program."""
    program = 0 if notes.program is None else notes.program.astype(np.int64)
    return notes.pitch + 128 * program


def _nearest(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The index in rising `others` (M,) of the one that is nearest to each of rising `values` (N,)."""
    right = np.clip(np.searchsorted(others, values), 1, max(len(others) - 1, 1))
    left = right - 1
    right = np.minimum(right, len(others) - 1)
    return np.where(values - others[left] <= others[right] - values, left, right)
