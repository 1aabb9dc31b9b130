"""Tokenizers: MIDI ⇄ token ids, behind one interface.

A model and a corpus belong to one vocabulary; the tokenizer's fingerprint says which. A new tokenizer is a
subclass of `Tokenizer` and a line in `KINDS`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dsmr_mlx import performance
from dsmr_mlx.errors import UserError
from dsmr_mlx.files import read_json, write_atomically
from dsmr_mlx.midi import Notes, read_notes
from dsmr_mlx.performance import Grammar

FILE = "tokenizer.json"
FORMAT = 1

# kind → module and class, imported when asked for: another tokenizer's library may be large or missing
KINDS = {"performance": "dsmr_mlx.tokenizer:PerformanceTokenizer", "ids": "dsmr_mlx.id_tokenizer:IdTokenizer"}


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
        """Notes → ids (T,) of dtype `dtype`, BOS first and EOS last."""

    @abstractmethod
    def decode(self, ids) -> Notes:
        """Any integers → notes. Never raises: whatever has no meaning is passed over."""

    def encode(self, midi: bytes | str | os.PathLike) -> np.ndarray:
        """A MIDI file, by path or bytes → ids as from `encode_notes`. UserError as in `midi.read_notes`."""
        return self.encode_notes(read_notes(midi))

    @property
    def no_notes(self) -> str | None:
        """Why `encode_notes` and `decode` know no notes, and what works instead; None for a tokenizer that does."""
        return None

    def grammar(self) -> Grammar | None:
        """What may follow what, None if this is not known for the vocabulary."""
        return None

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
        write_atomically(Path(folder) / FILE, json.dumps(description, indent=2) + "\n")

    @classmethod
    def restore(cls, folder: Path, parameters: dict[str, Any]) -> Tokenizer:
        """Build a saved tokenizer again. TypeError for parameters that it does not have."""
        return cls(**parameters)


class PerformanceTokenizer(Tokenizer):
    """The performance events of Oore et al. 2018, see `dsmr_mlx.performance`: 388 events and 3 specials."""

    kind = "performance"
    version = 1
    tokens = performance.token_names()
    pad_id = performance.PAD
    bos_id = performance.BOS
    eos_id = performance.EOS

    def encode_notes(self, notes: Notes) -> np.ndarray:
        """Notes → BOS, the canonical stream, EOS: (T,) uint16."""
        ids = performance.encode_notes(notes)
        return np.concatenate([[self.bos_id], ids, [self.eos_id]]).astype(self.dtype)

    def decode(self, ids) -> Notes:
        """See `performance.decode_ids`."""
        return performance.decode_ids(ids)

    def grammar(self) -> Grammar:
        """See `performance.performance_grammar`."""
        return performance.performance_grammar()


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer saved in a folder.

    Raises UserError naming the file when it is missing or damaged, of an unknown kind, or when its
    fingerprint is not the one that this version of the program computes: ids would then mean something else.
    """
    path = Path(folder) / FILE
    saved = _read_description(path)
    if not isinstance(saved["kind"], str) or saved["kind"] not in KINDS:
        raise UserError(f"{path}: kind {saved['kind']!r}, expected one of {', '.join(map(repr, KINDS))}")
    module, name = KINDS[saved["kind"]].split(":")
    tokenizer_class = getattr(importlib.import_module(module), name)
    try:
        tokenizer = tokenizer_class.restore(path.parent, saved["parameters"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: parameters {saved['parameters']} do not fit ({error})") from error
    if tokenizer.fingerprint != saved["fingerprint"]:
        raise UserError(
            f"{path}: fingerprint {saved['fingerprint']}, expected {tokenizer.fingerprint}: "
            "the vocabulary is not the one of this version"
        )
    return tokenizer


def _read_description(path: Path) -> dict[str, Any]:
    """The content of tokenizer.json, checked for its keys and format."""
    saved = read_json(path, "a tokenizer")
    keys = {"format", "kind", "parameters", "vocab_size", "fingerprint"}
    if not isinstance(saved, dict) or saved.keys() != keys:
        found = sorted(saved) if isinstance(saved, dict) else type(saved).__name__
        raise UserError(f"{path}: keys {found}, expected {sorted(keys)}")
    if saved["format"] != FORMAT:
        raise UserError(f"{path}: format {saved['format']!r}, expected {FORMAT}")
    return saved
