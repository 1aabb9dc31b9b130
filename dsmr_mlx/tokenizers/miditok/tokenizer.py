"""MidiTok tokenizers (https://miditok.readthedocs.io): REMI, TSD, MIDILike, Structured, PerTok, BEAT.

MidiTok counts quarters and ignores tempi, so every piece is converted to 120 quarters per minute first: a bar of 4/4
lasts two seconds, and times are those of the performance. Pedals are already part of the note lengths.

MidiTok does not store its vocabulary: its code assigns the ids. Therefore the names of all tokens are stored here, and
compared if another version of MidiTok is installed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import TOKENIZER_FILE, read_json, write_atomically
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import BadFile, Tokenizer
from dsmr_mlx.tokenizers.event_grammar import EventGrammar
from dsmr_mlx.tokenizers.miditok import config as miditok_config
from dsmr_mlx.tokenizers.miditok import grammar as miditok_grammar
from dsmr_mlx.tokenizers.miditok.vocabulary import MidiTokVocabulary, probe_notes

VOCABULARY_FILE = "vocabulary.json"
MAX_PROBE_ERROR = 0.26  # seconds: half a beat, for the coarsest grid


class MidiTokTokenizer(Tokenizer):
    """A MidiTok tokenizer, built from the result of `miditok_config.describe`.

    tokens: the names of the ids; None takes them from MidiTok. Raises `UserError` if MidiTok refuses the description,
    and, when encoding or decoding, if MidiTok has other names for the ids.
    """

    kind = "miditok"
    version = 1
    files_per_second = 15.0

    def __init__(self, description: dict[str, Any], tokens: tuple[str, ...] | None = None) -> None:
        if not isinstance(description, dict) or not {"tokenization", "config"} <= description.keys():
            raise UserError("`description`: expected MidiTok's tokenization and config")
        self._description = description
        self._tokens = tokens or MidiTokVocabulary(miditok_config.build(description)).tokens
        self._made_with = installed()
        missing = [token for token in miditok_config.SPECIAL_TOKENS if f"{token}_None" not in self._tokens]
        if missing:
            raise UserError(f"MidiTok: special_tokens without {', '.join(missing)}, expected PAD, BOS and EOS")

    @classmethod
    def from_name(cls, name: str, file: str | os.PathLike | None = None, programs: bool = False) -> MidiTokTokenizer:
        """Make the MidiTok tokenizer `name`; for the other arguments see `miditok_config.describe`.

        Raises `UserError` for an unknown name or setting, and for settings with which MidiTok does not reproduce the
        notes that it encodes.
        """
        tokenizer = cls(miditok_config.describe(name, file, programs))
        tokenizer._check_probe(str(file or f"`tokenizer` miditok:{name}"))
        return tokenizer

    @property
    def name(self) -> str:
        """The name of the tokenizer in MidiTok."""
        return self._description["tokenization"]

    @property
    def label(self) -> str:
        """See `Tokenizer.label`."""
        return f"miditok:{self.name}"

    @property
    def parameters(self) -> dict[str, Any]:
        """See `Tokenizer.parameters`."""
        return {"description": self._description}

    @property
    def tokens(self) -> tuple[str, ...]:
        """MidiTok's names of the ids; a learned id has the names of its events joined by +."""
        return self._tokens

    @cached_property
    def pad_id(self) -> int:
        """See `Tokenizer.pad_id`."""
        return self._tokens.index("PAD_None")

    @cached_property
    def bos_id(self) -> int:
        """See `Tokenizer.bos_id`."""
        return self._tokens.index("BOS_None")

    @cached_property
    def eos_id(self) -> int:
        """See `Tokenizer.eos_id`."""
        return self._tokens.index("EOS_None")

    @property
    def programs(self) -> bool:
        """See `Tokenizer.programs`: the setting `use_programs`, always true for BEAT."""
        return self._description["config"]["use_programs"]

    def encode_notes(self, notes: Notes) -> np.ndarray:
        """Encode notes as BOS, MidiTok's ids, EOS: `(T,)`. Times are counted from the first onset."""
        notes = (notes if self.programs else notes.as_piano()).from_first_onset()
        ids = self._vocabulary.encode(notes) if len(notes) else []
        return np.concatenate([[self.bos_id], ids, [self.eos_id]]).astype(self.dtype)

    def decode(self, ids) -> Notes:
        """See `Tokenizer.decode`. Tokens that MidiTok cannot decode are left out."""
        return self._vocabulary.decode(self.to_events(ids))

    def event_grammar(self) -> EventGrammar:
        """See `miditok_grammar.event_grammar`."""
        return self._grammar

    @property
    def token_events(self) -> tuple[tuple[int, ...], ...] | None:
        """See `Tokenizer.token_events`: None unless MidiTok has trained the tokenizer."""
        return self._vocabulary.token_events if miditok_config.is_trained(self._description) else None

    def save(self, folder: str | os.PathLike) -> None:
        """See `Tokenizer.save`; a second file holds the names of the ids."""
        super().save(folder)
        content = {"miditok": self._made_with, "tokens": list(self._tokens)}
        write_atomically(Path(folder) / VOCABULARY_FILE, json.dumps(content, indent=0) + "\n")

    @classmethod
    def restore(
        cls, folder: Path, parameters: dict[str, Any], restore_base: Callable[[Path, dict[str, Any]], Tokenizer]
    ) -> MidiTokTokenizer:
        """See `Tokenizer.restore`. Raises `UserError` if another version of MidiTok numbers the tokens differently.

        With the same version, or without MidiTok, the stored names are trusted, so that training does not need MidiTok.
        They are compared when encoding or decoding.
        """
        path = folder / VOCABULARY_FILE
        try:
            content = read_json(path, "the names of a MidiTok tokenizer's ids")
        except UserError as error:
            raise BadFile(str(error)) from error
        if not isinstance(content, dict) or content.keys() != {"miditok", "tokens"}:
            raise BadFile(f"{path}: expected an object with miditok and tokens")
        names = content["tokens"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise BadFile(f"{path}: tokens: expected a list of names")
        tokenizer = cls(tokens=tuple(names), **parameters)
        name = tokenizer._description["tokenization"]
        if reason := miditok_config.why_unsupported(name):
            raise BadFile(f"{folder / TOKENIZER_FILE}: tokenization {name!r} is {reason}")
        tokenizer._made_with = content["miditok"]
        if installed() not in (None, content["miditok"]):
            try:
                tokenizer._vocabulary  # noqa: B018
            except UserError as error:
                raise BadFile(f"{path}: {error}") from error
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without MidiTok's object and what depends on it, which are built again when needed."""
        return {name: value for name, value in vars(self).items() if name not in ("_vocabulary", "_grammar")}

    @cached_property
    def _grammar(self) -> EventGrammar:
        return miditok_grammar.event_grammar(self._vocabulary, self.eos_id)

    @cached_property
    def _vocabulary(self) -> MidiTokVocabulary:
        """The vocabulary in MidiTok. Raises `UserError` if the names of its ids differ from the stored ones."""
        vocabulary = MidiTokVocabulary(miditok_config.build(self._description))
        if vocabulary.tokens == self._tokens:
            return vocabulary
        found = type(self)(self._description, vocabulary.tokens).fingerprint
        pairs = enumerate(zip(self._tokens, vocabulary.tokens, strict=False))
        lengths = f"{len(self._tokens)} ids were {len(vocabulary.tokens)}"
        where = next((f"id {i} was {was}, is {now}" for i, (was, now) in pairs if was != now), lengths)
        raise UserError(
            f"MidiTok {installed()} numbers the tokens of {self.name} differently ({where}): fingerprint {found}, "
            f"expected {self.fingerprint} as with MidiTok {self._made_with}"
        )

    def _check_probe(self, where: str) -> None:
        """Raise `UserError` if short music is not decoded to the same notes, as with a REMI that numbers its bars."""
        given = probe_notes(self._vocabulary.miditok)
        try:
            found = self.decode(self.encode_notes(given))
        except Exception as error:  # MidiTok does not document what it raises for invalid settings
            raise UserError(f"{where}: MidiTok fails to encode notes ({type(error).__name__}: {error})") from error
        if len(found) != len(given) or np.abs(found.onset - given.onset).max() > MAX_PROBE_ERROR:
            raise UserError(
                f"{where}: with these settings MidiTok does not reproduce the notes that it encodes: {len(given)} in "
                f"{given.duration:.1f} s became {len(found)} in {found.duration:.1f} s"
            )


def installed() -> str | None:
    """Return the version of MidiTok, or None if it is not installed."""
    try:
        return metadata.version("miditok")
    except metadata.PackageNotFoundError:
        return None
