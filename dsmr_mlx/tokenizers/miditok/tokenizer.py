"""MidiTok's tokenizers (https://miditok.readthedocs.io): REMI, TSD, MIDILike, Structured, PerTok, CPWord, Octuple, …

MidiTok counts quarters and ignores tempi, so every piece is brought to 120 quarters a minute first: its bars of 4/4 are
bars of two seconds, and times are those of the performance. Pedals are in the lengths of the notes already.

MidiTok does not store its vocabulary: which token has which number is decided by its code. So the names of all tokens
are stored here, and compared when another version of MidiTok is found.
"""

from __future__ import annotations

import json
import os
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import read_json, write_atomically
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import BadFile, Tokenizer
from dsmr_mlx.tokenizers.event_grammar import EventGrammar
from dsmr_mlx.tokenizers.miditok import config as miditok_config
from dsmr_mlx.tokenizers.miditok import grammar as miditok_grammar
from dsmr_mlx.tokenizers.miditok.vocabulary import QUARTERS_PER_BAR, QUARTERS_PER_SECOND, MidiTokVocabulary, probe_notes

VOCABULARY = "vocabulary.json"
LARGEST_PROBE_ERROR = 0.26  # seconds: half a beat, for the coarsest of grids


class MidiTokTokenizer(Tokenizer):
    """One of MidiTok's tokenizers, from what `miditok_config.describe` gave.

    tokens: the names of the ids, if they are known; else MidiTok is asked. Raises UserError for a description that
    MidiTok does not take, and where notes become ids or ids notes, if MidiTok has other names for the ids.
    """

    kind = "miditok"
    version = 1
    files_per_second = 15.0

    def __init__(self, description: dict[str, Any], tokens: tuple[str, ...] | None = None) -> None:
        if not isinstance(description, dict) or not {"tokenization", "config"} <= description.keys():
            raise UserError("description: expected MidiTok's tokenization and config")
        self._description = description
        self._tokens = tokens or MidiTokVocabulary(miditok_config.build(description)).tokens
        self._made_with = installed()
        missing = [token for token in miditok_config.SPECIAL_TOKENS if f"{token}_None" not in self._tokens]
        if missing:
            raise UserError(f"MidiTok: special_tokens without {', '.join(missing)}, expected PAD, BOS and EOS")

    @classmethod
    def named(cls, name: str, config: str | os.PathLike | None = None, programs: bool = False) -> MidiTokTokenizer:
        """MidiTok's tokenizer of that name; config: a JSON file with its settings, see `miditok_config.describe`.

        Raises UserError for a name or settings that MidiTok does not have, and for settings with which it does not
        give back the notes that it was given.
        """
        tokenizer = cls(miditok_config.describe(name, config, programs))
        tokenizer._check_probe(str(config or f"--tokenizer miditok:{name}"))
        return tokenizer

    @property
    def name(self) -> str:
        """MidiTok's name of the tokenizer."""
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
        """MidiTok's names of the ids; those of fields begin with the number of the field, and what was learned has the
        names of its events with + between them.
        """
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
        """See `Tokenizer.programs`: the setting use_programs, which MMM, MuMIDI and BEAT always have."""
        return self._description["config"]["use_programs"]

    def encode_notes(self, notes: Notes) -> np.ndarray:
        """Notes → BOS, MidiTok's ids, EOS: (T,), times counted from the first onset.

        UserError for a piece with more bars than the vocabulary has.
        """
        notes = (notes if self.programs else notes.as_piano()).from_first_onset()
        self._check_bars(notes)
        ids = self._vocabulary.encode(notes) if len(notes) else []
        return np.concatenate([[self.bos_id], ids, [self.eos_id]]).astype(self.dtype)

    def decode(self, ids) -> Notes:
        """Any integers → notes; tokens that MidiTok cannot make sense of are left out. See `Tokenizer.decode`."""
        return self._vocabulary.decode(self.to_events(ids))

    def whole(self, events: np.ndarray) -> np.ndarray:
        """Without a row of fields that is not complete."""
        return self._vocabulary.whole(events)

    def event_grammar(self) -> EventGrammar:
        """See `miditok_grammar.event_grammar`."""
        return self._grammar

    @property
    def token_events(self) -> tuple[tuple[int, ...], ...] | None:
        """See `Tokenizer.token_events`: those of a tokenizer that MidiTok has trained."""
        return self._vocabulary.token_events if miditok_config.is_trained(self._description) else None

    def save(self, folder: str | os.PathLike) -> None:
        """See `Tokenizer.save`; the names of the ids go into a file of their own."""
        super().save(folder)
        content = {"miditok": self._made_with, "tokens": list(self._tokens)}
        write_atomically(Path(folder) / VOCABULARY, json.dumps(content, indent=0) + "\n")

    @classmethod
    def restore(cls, folder: Path, parameters: dict[str, Any]) -> MidiTokTokenizer:
        """See `Tokenizer.restore`. Raises UserError where MidiTok is another version and numbers tokens differently.

        With the version that made it, or without MidiTok, the stored names are taken as they are, so that training
        needs no MidiTok; they are compared where notes become ids or ids notes.
        """
        path = folder / VOCABULARY
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
        tokenizer._made_with = content["miditok"]
        if installed() not in (None, content["miditok"]):
            try:
                tokenizer._vocabulary  # noqa: B018
            except UserError as error:
                raise BadFile(f"{path}: {error}") from error
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        """Without MidiTok's object and what follows from it, which are built again where they are needed."""
        return {name: value for name, value in vars(self).items() if name not in ("_vocabulary", "_grammar")}

    @cached_property
    def _grammar(self) -> EventGrammar:
        return miditok_grammar.event_grammar(self._vocabulary, self.eos_id)

    @cached_property
    def _vocabulary(self) -> MidiTokVocabulary:
        """MidiTok's tokenizer. Raises UserError if the names of its ids are not what they were."""
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

    def _check_bars(self, notes: Notes) -> None:
        """Raise UserError for a note after the last bar that has a number: MidiTok would leave it out."""
        most = self._description["config"].get("additional_params", {}).get("max_bar_embedding")
        last = float(notes.onset.max()) if len(notes) else 0.0
        seconds = None if most is None else most * QUARTERS_PER_BAR / QUARTERS_PER_SECOND
        if seconds is not None and last >= seconds:
            raise UserError(
                f"a note after {last:.0f} s, expected none after {seconds:.0f} s: miditok:{self.name} has numbers for "
                f"{most} bars of 2 s (max_bar_embedding)"
            )

    def _check_probe(self, where: str) -> None:
        """Raise UserError if a little music does not come back, as with a REMI that numbers its bars."""
        given = probe_notes(self._vocabulary.miditok)
        try:
            found = self.decode(self.encode_notes(given))
        except Exception as error:  # what MidiTok raises for settings that do not fit is not documented
            raise UserError(f"{where}: MidiTok fails to encode notes ({type(error).__name__}: {error})") from error
        if len(found) != len(given) or np.abs(found.onset - given.onset).max() > LARGEST_PROBE_ERROR:
            raise UserError(
                f"{where}: with these settings MidiTok does not give back the notes that it is given: {len(given)} in "
                f"{given.duration:.1f} s became {len(found)} in {found.duration:.1f} s"
            )


def installed() -> str | None:
    """The version of MidiTok, None without it."""
    try:
        return metadata.version("miditok")
    except metadata.PackageNotFoundError:
        return None
