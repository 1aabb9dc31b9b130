"""Report how a tokenizer encodes a piece: tokens, counts, and the differences after decoding."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Difference:
    """The mean and the largest absolute difference of some values."""

    mean: float
    max: float


@dataclass(frozen=True)
class RoundTrip:
    """Notes compared before encoding and after decoding.

    given, returned: the number of notes; matched: those with a counterpart of the same pitch and program
    onset, offset, velocity: differences of matched notes, in seconds and MIDI units; None if there are none
    """

    given: int
    returned: int
    matched: int
    onset: Difference | None
    offset: Difference | None
    velocity: Difference | None


@dataclass(frozen=True)
class TokenReport:
    """A piece as tokens, including prefixes, BOS and EOS.

    label, fingerprint, vocab_size: of the tokenizer; ids: the tokens; names: their names; notes, seconds: of the piece;
    events: the number of events in the tokens, one for a token without events, such as a prefix
    types: their number by type, the most frequent first
    round_trip: the differences after decoding
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
        """Tokens per note."""
        return len(self.ids) / max(self.notes, 1)

    @property
    def per_second(self) -> float:
        """Tokens per second of music."""
        return len(self.ids) / max(self.seconds, 1e-9)

    @property
    def compression(self) -> float:
        """Events per token, 1 without subwords."""
        return self.events / len(self.ids)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        rates = {"per_note": self.per_note, "per_second": self.per_second, "compression": self.compression}
        return {"tokens": len(self.ids), **rates, **asdict(self)}


def report_tokens(tokenizer: Tokenizer, notes: Notes, ids: np.ndarray) -> TokenReport:
    """Describe the ids `(T,)` of some notes, and compare the notes with the decoded ones."""
    names, rows = tokenizer.event_names, tokenizer.token_events
    events = [names[event] for event in tokenizer.to_events(ids)]
    events += [tokenizer.tokens[i] for i in ids if rows is not None and not rows[i]]
    types = Counter(map(type_name, events))
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
        round_trip=round_trip(tokenizer.with_decoded_programs(notes), tokenizer.decode_piece(ids)),
    )


def type_name(token: str) -> str:
    """Return the type in the name of a token: NOTE_ON of `NOTE_ON_60`, Duration of `Duration_0.3.50`."""
    return token.rpartition("_")[0] or token


def round_trip(given: Notes, returned: Notes) -> RoundTrip:
    """Compare each of the given notes with the returned one of its pitch and program that begins nearest to it."""
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


def match(given: Notes, returned: Notes) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices `(M,)` of matching notes in both: same pitch and program, mutually nearest in their onsets."""
    pairs = [np.zeros((0, 2), np.int64)]
    voices, others = given.voices, returned.voices
    for voice in np.intersect1d(voices, others):
        here, there = np.flatnonzero(voices == voice), np.flatnonzero(others == voice)
        nearest = _nearest(given.onset[here], returned.onset[there])
        back = _nearest(returned.onset[there], given.onset[here])
        mutual = back[nearest] == np.arange(len(here))
        pairs.append(np.stack([here[mutual], there[nearest[mutual]]], axis=1))
    before, after = np.concatenate(pairs).T
    return before, after


def _nearest(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the index in ascending `others` `(M,)` of the nearest one to each of the ascending `values` `(N,)`."""
    right = np.clip(np.searchsorted(others, values), 1, max(len(others) - 1, 1))
    left = right - 1
    right = np.minimum(right, len(others) - 1)
    return np.where(values - others[left] <= others[right] - values, left, right)
