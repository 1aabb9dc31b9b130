"""Tokenizers: MIDI ⇄ token ids, behind one interface.

A model and a corpus belong to one vocabulary; the tokenizer's fingerprint says which. A new tokenizer is a
subclass of `Tokenizer` and a line in `KINDS`. The ids of a base tokenizer are *events*; a vocabulary of subwords has
*pieces* for ids, each of which stands for several events of a base tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import TOKENIZER_FILE, write_atomically
from dsmr_mlx.music.midi import read_notes
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.event_grammar import EventGrammar

FORMAT = 1


class BadFile(UserError):
    """A file beside `tokenizer.json` is missing or damaged, or does not belong to it. The message names it."""


class Tokenizer(ABC):
    """What every tokenizer can do. Ids are integers in 0..vocab_size − 1, and id i is named `tokens[i]`.

    A subclass sets `kind` and `version` (raised whenever the same notes would give other ids), is built from
    its `parameters` as keyword arguments, and defines what is abstract here. One that has files of its own
    extends `save` and `restore`.

    A special id is None where a vocabulary has none, or it is not known: generation needs BOS to begin without a
    prompt and EOS to end a piece by itself; PAD is only kept from being drawn. Two of them may be the same id. One
    without BOS defines `prompt` too.
    """

    kind: ClassVar[str]
    version: ClassVar[int]
    files_per_second: ClassVar[float] = 500.0  # about how many pieces one process encodes

    @property
    @abstractmethod
    def tokens(self) -> tuple[str, ...]:
        """The names of the ids, in order."""

    @property
    @abstractmethod
    def pad_id(self) -> int | None:
        """The id that fills lanes; never part of a piece."""

    @property
    @abstractmethod
    def bos_id(self) -> int | None:
        """The id that every piece begins with."""

    @property
    @abstractmethod
    def eos_id(self) -> int | None:
        """The id that every piece ends with."""

    @abstractmethod
    def encode_notes(self, notes: Notes) -> np.ndarray:
        """Notes → ids (T,) of dtype `dtype`, BOS first and EOS last. UserError for what the vocabulary cannot say."""

    @abstractmethod
    def decode(self, ids) -> Notes:
        """Any integers → notes. Never raises: whatever has no meaning is passed over."""

    def encode(self, midi: bytes | str | os.PathLike) -> np.ndarray:
        """A MIDI file, by path or bytes → ids as from `encode_notes`. UserError as in `midi.read_notes`."""
        return self.encode_notes(read_notes(midi, programs=self.programs))

    @property
    def label(self) -> str:
        """What the tokenizer is called where it is shown."""
        return self.kind

    @property
    def event_names(self) -> tuple[str, ...]:
        """The names of the events, by their ids."""
        return self.tokens

    @property
    def programs(self) -> bool:
        """Whether the ids say which instrument plays; else all are one, and drums are left out."""
        return False

    @property
    def no_notes(self) -> str | None:
        """Why `encode_notes` and `decode` know no notes, and what works instead; None for a tokenizer that does."""
        return None

    def event_grammar(self) -> EventGrammar | None:
        """What the events mean and what may follow what, None if this is not known; for ids see `dsmr_mlx.tokenizers.token_tables`."""
        return None

    @property
    def token_events(self) -> tuple[tuple[int, ...], ...] | None:
        """The events of each id, in order; None where every id is an event."""
        return None

    def to_events(self, ids) -> np.ndarray:
        """Any ids → the events that they stand for, int64 (T′,); what is no id of the vocabulary is passed over."""
        ids = np.asarray(ids).ravel()
        ids = ids[(ids >= 0) & (ids < self.vocab_size)].astype(np.int64)
        return ids if self.token_events is None else self._pieces_in_a_row.of(ids)

    def from_events(self, events: np.ndarray) -> np.ndarray:
        """Events (T,) → ids that stand for them: as `to_events` gave them, but where subwords begin and end anew."""
        return events.astype(self.dtype)

    def seconds(self, ids: np.ndarray) -> float | None:
        """How much time passes in a piece, until its last event; None where the vocabulary has no clock."""
        grammar = self.event_grammar()
        if grammar is None or not grammar.has_clock:
            return None
        elapsed = grammar.elapsed(self.to_events(ids))
        return float(elapsed[-1] * grammar.seconds_per_tick) if len(elapsed) else 0.0

    def first_seconds(self, ids: np.ndarray, seconds: float) -> np.ndarray:
        """The ids (T′,) of what happens in the first `seconds` of a piece, keys that sound then still held.

        Raises UserError where the vocabulary has no clock.
        """
        grammar = self.event_grammar()
        if grammar is None or not grammar.has_clock:
            raise UserError(f"tokenizer {self.label}: its tokens have no known duration")
        events = self.to_events(ids)
        limit = seconds / grammar.seconds_per_tick + 1e-6  # 0.57 s are 57 ticks, and in floating point a little less
        late = np.flatnonzero(grammar.elapsed(events) > limit)
        return self.from_events(self.whole(events[: late[0]]) if len(late) else events)

    def whole(self, events: np.ndarray) -> np.ndarray:
        """Events (T,) without what they begin at their end and do not complete, where one needs several tokens."""
        return events

    @cached_property
    def _pieces_in_a_row(self) -> _Rows:
        return _Rows(self.token_events)

    def prompt(self, ids: np.ndarray) -> np.ndarray:
        """What a model reads before it goes on from `ids` (T,): BOS and the music, without EOS; int64 (T′,), T′ ≥ 1."""
        special = [i for i in (self.pad_id, self.bos_id, self.eos_id) if i is not None]
        return np.append(self.bos_id, ids[~np.isin(ids, special)]).astype(np.int64)

    @property
    def parameters(self) -> dict[str, Any]:
        """The keyword arguments that build this tokenizer again; JSON values."""
        return {}

    @property
    def vocab_size(self) -> int:
        """The number of ids, specials included."""
        return len(self.tokens)

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @cached_property
    def fingerprint(self) -> str:
        """sha256, in hex, of everything that gives the ids their meaning."""
        meaning = [self.kind, self.version, self.parameters, self.tokens]
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | os.PathLike) -> None:
        """Write `tokenizer.json` into a folder, made if need be; `load_tokenizer` reads it."""
        description = {
            "format": FORMAT,
            "kind": self.kind,
            "parameters": self.parameters,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(folder) / TOKENIZER_FILE, json.dumps(description, indent=2) + "\n")

    @classmethod
    def restore(cls, folder: Path, parameters: dict[str, Any]) -> Tokenizer:
        """Build a saved tokenizer again. TypeError for parameters that it does not have."""
        return cls(**parameters)


class _Rows:
    """Short rows of integers, end to end, so that many can be put together at once."""

    def __init__(self, rows: tuple[tuple[int, ...], ...]) -> None:
        self.length = np.array([len(row) for row in rows], np.int64)
        self.start = np.cumsum(self.length) - self.length
        self.flat = np.array([value for row in rows for value in row], np.int64)

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of these numbers (T,), one after the other: (T′,) int64."""
        length = self.length[numbers]
        begins = np.cumsum(length) - length
        return self.flat[np.arange(length.sum()) + np.repeat(self.start[numbers] - begins, length)]
