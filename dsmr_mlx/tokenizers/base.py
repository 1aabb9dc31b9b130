"""The interface of all tokenizers: MIDI ⇄ token ids.

A model and a corpus belong to one vocabulary, identified by the fingerprint of the tokenizer. A new tokenizer is a
subclass of `Tokenizer` and a line in `registry.KINDS`. The ids of most tokenizers are *events*. The ids of a subword
vocabulary are *tokens* that stand for several events of a base tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import TOKENIZER_FILE, write_atomically
from dsmr_mlx.music.midi import READ_LIMITS, FileLimits, Reading, read_midi
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.repairs import warn_of_repairs
from dsmr_mlx.tokenizers.event_grammar import EventGrammar

FORMAT = 1


class BadFile(UserError):
    """Raised for a missing or damaged file of a tokenizer, or one of another tokenizer or version; names the file."""


class Tokenizer(ABC):
    """A tokenizer with the ids 0..vocab_size − 1; id i has the name `tokens[i]`.

    A subclass sets `kind` and `version`, which is incremented when the same notes give other ids. It is built from its
    `parameters` as keyword arguments and defines the abstract members. If it has files, it extends `save` and
    `restore`.

    A special id is None if the vocabulary has none or it is unknown. Generation needs BOS to begin without a prompt and
    EOS to end a piece; PAD is only excluded from sampling. Two special ids may be equal. A tokenizer without BOS also
    defines `prompt`.

    A vocabulary may have FILL and PLAY, both or none. The ids from FILL to PLAY are *shown* to a model: the length of a
    gap and what follows it, see `data.gaps`. They are not part of the music, which continues after PLAY as before FILL.
    """

    kind: ClassVar[str]
    version: ClassVar[int]
    earlier_versions: ClassVar[Mapping[str, int]] = {}  # fingerprint → version, for messages
    files_per_second: ClassVar[float] = 500.0  # a rough speed of encoding in one process

    @property
    @abstractmethod
    def tokens(self) -> tuple[str, ...]:
        """The names of the ids, in order."""

    @property
    @abstractmethod
    def pad_id(self) -> int | None:
        """The id that fills lanes and never occurs in a piece."""

    @property
    @abstractmethod
    def bos_id(self) -> int | None:
        """The first id of every piece."""

    @property
    @abstractmethod
    def eos_id(self) -> int | None:
        """The last id of every piece."""

    @property
    def fill_id(self) -> int | None:
        """The id that begins a shown span."""
        return None

    @property
    def play_id(self) -> int | None:
        """The id that ends a shown span."""
        return None

    @abstractmethod
    def encode_notes(self, notes: Notes) -> np.ndarray:
        """Encode notes as ids `(T,)` of type `dtype`, BOS first and EOS last. Raises `UserError` if it cannot."""

    @abstractmethod
    def decode(self, ids) -> Notes:
        """Decode any integers to notes. Never raises: ids without a meaning are skipped."""

    def decode_piece(self, ids: np.ndarray) -> Notes:
        """Decode the ids `(T,)` of a whole piece. Times count as in the notes of `read`."""
        return self.decode(ids)

    def encode(self, midi: bytes | str | os.PathLike) -> np.ndarray:
        """Encode a MIDI file, a path or bytes, like `encode_notes`.

        Warns and raises `UserError` like `midi.read_notes`.
        """
        reading, ids = self.read(midi)
        warn_of_repairs(None if isinstance(midi, bytes | bytearray | memoryview) else midi, reading.repairs)
        return ids

    def read(self, midi: bytes | str | os.PathLike, limits: FileLimits = READ_LIMITS) -> tuple[Reading, np.ndarray]:
        """Return the notes of a MIDI file as `midi.read_midi` does, and its ids `(T,)`."""
        reading = read_midi(midi, programs=self.programs, limits=limits)
        return reading, self.encode_notes(reading.notes)

    def encode_excerpt(self, midi: bytes | str | os.PathLike, notes: Notes) -> np.ndarray:
        """Encode those notes of a MIDI file, as `midi.read_notes` returns them, that begin at some time or later. The
        first of them is at 0 s. Raises `UserError` like `read`.
        """
        return self.encode_notes(notes)

    def with_prefixes(self, **prefixes: str | None) -> Tokenizer:
        """Return a tokenizer whose prompts begin with labels such as `composer="bach"`; None is left out.

        Raises `UserError` for a label that the vocabulary lacks.
        """
        for name, value in prefixes.items():
            if value is not None:
                raise UserError(f"`{name}` {value}: tokenizer {self.label} has no such label")
        return self

    def changed(self, ids: np.ndarray, change: Callable[[Notes], Notes]) -> np.ndarray:
        """Return the ids `(T′,)` of a piece `(T,)` after a change of its notes that keeps their number and order, such
        as `data.augmentation.Draw.apply`. Raises `UserError` like `encode_notes`.
        """
        return self.encode_notes(change(self.decode(ids)))

    def with_announced_end(self, ids: np.ndarray, distance: int) -> np.ndarray:
        """Return a piece `(T,)` for training with an id that announces its end about `distance` ids ahead:
        `(T + 1,)`; unchanged if the vocabulary has no such id or the piece is too short.
        """
        return ids

    def recovered(self, notes: Notes, ids: np.ndarray) -> tuple[int, float]:
        """Return how much of the encoded notes decoding `ids` `(T,)` recovers: the number of notes, whatever their
        times, and the duration in seconds.
        """
        returned = self.decode_piece(ids)
        return self.with_decoded_programs(notes).count_common(returned), returned.duration

    def with_decoded_programs(self, notes: Notes) -> Notes:
        """Return notes with the programs that they have after decoding. Programs that the vocabulary lacks are kept."""
        return notes

    @property
    def label(self) -> str:
        """The name shown to users."""
        return self.kind

    @property
    def event_names(self) -> tuple[str, ...]:
        """The names of the events, in the order of their ids."""
        return self.tokens

    @property
    def programs(self) -> bool:
        """Whether the ids encode the instruments. If not, all notes are one instrument, without drums."""
        return False

    @property
    def decodes(self) -> bool:
        """Whether notes can be encoded and ids decoded. If not, `why_not` is the reason."""
        return not self.why_not

    @property
    def why_not(self) -> str:
        """Why notes cannot be encoded or ids decoded, and an alternative; empty if they can."""
        return ""

    def event_grammar(self) -> EventGrammar | None:
        """Return the meanings and the grammar of the events, or None if unknown. For tokens see `token_tables`."""
        return None

    @property
    def token_events(self) -> tuple[tuple[int, ...], ...] | None:
        """The events of each id, in order; None if every id is an event."""
        return None

    def to_events(self, ids) -> np.ndarray:
        """Return the events of any ids, int64 `(T′,)`. Ids outside the vocabulary are skipped."""
        ids = np.asarray(ids).ravel()
        ids = ids[(ids >= 0) & (ids < self.vocab_size)].astype(np.int64)
        return ids if self.token_events is None else self._token_rows.concatenate(ids)

    def shown_mask(self, ids) -> np.ndarray:
        """Return which ids are shown, not part of the music: bool `(T,)`, see the function `shown_mask`."""
        return shown_mask(np.asarray(ids).ravel(), self.fill_id, self.play_id)

    def without_shown(self, ids) -> np.ndarray:
        """Return the ids `(T′,)` that are part of the music."""
        return np.asarray(ids).ravel()[~self.shown_mask(ids)]

    def from_events(self, events: np.ndarray) -> np.ndarray:
        """Return ids for events `(T,)`. The inverse of `to_events`, except that subwords may be divided differently."""
        return events.astype(self.dtype)

    def seconds(self, ids: np.ndarray) -> float | None:
        """Return the seconds up to the last event of a piece, or None if the vocabulary has no clock."""
        grammar = self.event_grammar()
        if grammar is None or not grammar.has_clock:
            return None
        elapsed = grammar.elapsed(self.to_events(self.without_shown(ids)))
        return float(elapsed[-1] * grammar.seconds_per_tick) if len(elapsed) else 0.0

    def first_seconds(self, ids: np.ndarray, seconds: float) -> np.ndarray:
        """Return the ids `(T′,)` of the first `seconds` of a piece, without shown ids. Keys may be down at the end.

        Raises `UserError` if the vocabulary has no clock.
        """
        grammar = self.event_grammar()
        if grammar is None or not grammar.has_clock:
            raise UserError(f"tokenizer {self.label}: its tokens have no known duration")
        events = self.to_events(self.without_shown(ids))
        limit = seconds / grammar.seconds_per_tick + 1e-6  # 0.57 s are 57 ticks, but slightly less in floating point
        late = np.flatnonzero(grammar.elapsed(events) > limit)
        return self.from_events(events[: late[0]] if len(late) else events)

    @cached_property
    def _token_rows(self) -> _Rows:
        return _Rows(self.token_events)

    def prompt(self, ids: np.ndarray) -> np.ndarray:
        """Return what a model reads before it continues `ids` `(T,)`: BOS, then the ids without special ids.

        int64 `(T′,)`, T′ ≥ 1.
        """
        return np.append(self.bos_id, self.without_special(ids)).astype(np.int64)

    def without_special(self, ids: np.ndarray) -> np.ndarray:
        """Return ids `(T,)` without PAD, BOS and EOS."""
        special = [i for i in (self.pad_id, self.bos_id, self.eos_id) if i is not None]
        return ids[~np.isin(ids, special)]

    @property
    def parameters(self) -> dict[str, Any]:
        """The keyword arguments that build this tokenizer again, as JSON values."""
        return {}

    @property
    def vocab_size(self) -> int:
        """The number of ids, special ids included."""
        return len(self.tokens)

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256, in hex, of everything that defines the meaning of the ids."""
        meaning = [self.kind, self.version, self.parameters, self.tokens]
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | os.PathLike) -> None:
        """Write `tokenizer.json` into a folder, created if needed. `registry.load_tokenizer` reads it."""
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
    def restore(
        cls, folder: Path, parameters: dict[str, Any], restore_base: Callable[[Path, dict[str, Any]], Tokenizer]
    ) -> Tokenizer:
        """Build a tokenizer saved in `folder`. Raises `TypeError` for invalid parameters.

        restore_base: `registry.restore_tokenizer`, for a tokenizer that contains another one.
        """
        return cls(**parameters)


def shown_mask(ids: np.ndarray, fill_id: int | None, play_id: int | None) -> np.ndarray:
    """Return which of ids `(T,)` lie between a FILL and the next PLAY, both included: bool `(T,)`.

    Defined for any ids, and each value depends only on the ids up to there: another FILL before that PLAY changes
    nothing; without a PLAY, all that follows is shown; a PLAY without a FILL is shown alone.
    """
    if fill_id is None:
        return np.zeros(len(ids), bool)
    fills, plays = ids == fill_id, ids == play_id
    last = np.maximum.accumulate(np.where(fills | plays, np.arange(len(ids)), -1))  # the last FILL or PLAY, or −1
    return plays | ((last >= 0) & fills[last])


class _Rows:
    """Rows of integers of different lengths, concatenated quickly."""

    def __init__(self, rows: tuple[tuple[int, ...], ...]) -> None:
        self.length = np.array([len(row) for row in rows], np.int64)
        self.start = np.cumsum(self.length) - self.length
        self.flat = np.array([value for row in rows for value in row], np.int64)

    def concatenate(self, index: np.ndarray) -> np.ndarray:
        """Return the rows with the indices `(T,)` one after the other, int64 `(T′,)`."""
        length = self.length[index]
        begins = np.cumsum(length) - length  # where each row begins in the result
        return self.flat[np.arange(length.sum()) + np.repeat(self.start[index] - begins, length)]
