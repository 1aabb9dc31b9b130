"""Read a prepared corpus: the ids of whole pieces, end to end in one file, with an index.

    corpus.json   the index: pieces in the order of their tokens, skipped files, origin
    tokens.npy    `(n_tokens,)` uint16, or uint32 for a vocabulary above 65,536; little-endian
    tokenizer/    the tokenizer that made the ids

`corpus_writer` writes it. Reading needs only NumPy and the standard library.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dsmr_mlx.common.errors import UserError, shortened
from dsmr_mlx.common.files import read_json
from dsmr_mlx.common.paths import explain_no_corpus, nfc
from dsmr_mlx.data.token_file import TokenFile
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.registry import load_tokenizer

FORMAT = 2
INDEX, TOKENS, TOKENIZER = "corpus.json", "tokens.npy", "tokenizer"
SPLITS = ("train", "validation", "test")
MAX_NUMBER = 2**53  # tokens, notes or seconds
MAX_ROUNDING = 1.0  # seconds, at the end of a piece


@dataclass(frozen=True)
class Piece:
    """One piece of a corpus.

    source: its file, relative to the prepared folder; unique
    split: one of `SPLITS`
    composer, title: may be empty
    offset, length: its place in the tokens, with BOS and EOS
    duration, notes: seconds of music and number of notes in the file
    sha256: of its tokens' bytes
    events: number of ids of the base tokenizer that its tokens represent, with BOS and EOS. This equals `length` except
        for subwords; losses per event are comparable with those of the base tokenizer
    notes_encoded, duration_encoded: notes and seconds recoverable from the tokens. A vocabulary may drop notes or
        shorten long rests
    repairs: faults of the file that were repaired, see `music.repairs.describe_repairs`; mostly empty
    """

    source: str
    split: str
    composer: str
    title: str
    offset: int
    length: int
    duration: float
    notes: int
    sha256: str
    events: int = 0
    notes_encoded: int = -1
    duration_encoded: float = -1.0
    repairs: str = ""

    def __post_init__(self) -> None:
        if not self.events:  # missing in the index of a vocabulary without subwords
            object.__setattr__(self, "events", self.length)
        if self.notes_encoded < 0:  # missing in the index: unknown
            object.__setattr__(self, "notes_encoded", self.notes)
        if self.duration_encoded < 0:
            object.__setattr__(self, "duration_encoded", self.duration)

    @property
    def keeps_time(self) -> bool:
        """Whether its tokens last as long as the music, up to rounding."""
        return abs(self.duration_encoded - self.duration) <= MAX_ROUNDING

    @property
    def work(self) -> tuple[str, ...]:
        """Identifies the composition, see `work_key`."""
        return work_key(self.composer, self.title, self.source)


def work_key(composer: str, title: str, source: str) -> tuple[str, ...]:
    """Identify the composition of a file: the same for all its performances, whatever the case and spaces of the title.

    If the composer or the title is unknown, the source is used instead.
    """
    names = tuple(" ".join(nfc(name).casefold().split()) for name in (composer, title))
    return names if all(names) else (nfc(source),)


@dataclass(frozen=True)
class Skipped:
    """A file that is not in the corpus, and the reason."""

    source: str
    reason: str


class Corpus:
    """A corpus on disk, opened by `Corpus.load`.

    path: its folder; tokenizer: the one that made the ids; origin: its source, as recorded by `prepare`;
    skipped: files that are not in it
    """

    def __init__(
        self, path: Path, tokenizer: Tokenizer, pieces: list[Piece], tokens: TokenFile, index: dict[str, Any]
    ) -> None:
        self.path = path
        self.tokenizer = tokenizer
        self.origin: dict[str, Any] = index["origin"]
        self.skipped = [Skipped(**entry) for entry in index["skipped"]]
        self._pieces = pieces
        self._tokens = tokens

    @classmethod
    def load(cls, path: str | os.PathLike) -> Corpus:
        """Open a corpus. The tokens stay on disk.

        Raises `UserError`, which names the file, if a file is missing or damaged or the files do not belong together.
        The tokens themselves are not read; `tokens` reads and checks those of a piece.
        """
        path = Path(path)
        index = read_index(path)
        tokenizer = load_tokenizer(path / TOKENIZER)
        if tokenizer.fingerprint != index["tokenizer"]:
            raise UserError(
                f"{path / TOKENIZER}: fingerprint {tokenizer.fingerprint}, expected {index['tokenizer']} as in {INDEX}"
            )
        pieces = _pieces(path / INDEX, index)
        tokens = TokenFile(path / TOKENS, tokenizer.dtype, index["n_tokens"])
        return cls(path, tokenizer, pieces, tokens, index)

    @property
    def vocab_size(self) -> int:
        """The number of ids of the tokenizer."""
        return self.tokenizer.vocab_size

    @property
    def n_tokens(self) -> int:
        """Number of tokens in all pieces."""
        return self._tokens.n_tokens

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits with at least one piece, in the order of `SPLITS`."""
        present = {piece.split for piece in self._pieces}
        return tuple(split for split in SPLITS if split in present)

    def pieces(self, split: str | None = None) -> list[Piece]:
        """Return the pieces of one split, or all. Raises `UserError` if the corpus has no such split."""
        if split is not None and split not in self.splits:
            if split in SPLITS:
                raise UserError(f"{self.path}: no {split} pieces, expected `split` {' or '.join(self.splits)}")
            raise UserError(f"{self.path}: split {split!r}, expected one of {', '.join(self.splits)}")
        return [piece for piece in self._pieces if split in (None, piece.split)]

    def tokens(self, piece: Piece) -> np.ndarray:
        """Return the ids `(T,)` of a piece, BOS first and EOS last, read-only.

        Raises `UserError`, which names the piece, if they differ from the index or are not ids of the vocabulary: a
        model would read outside its tables.
        """
        ids = self._tokens.read(piece.offset, piece.length)
        if (found := token_hash(ids)) != piece.sha256:
            raise UserError(f"{self._tokens.path}: {piece.source} has sha256 {found}, expected {piece.sha256}")
        if ids.max() >= self.vocab_size:
            raise UserError(
                f"{self._tokens.path}: {piece.source} has the id {ids.max()}, expected ids below {self.vocab_size}"
            )
        return ids

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything that affects training: vocabulary, tokens, pieces and splits."""
        content = [
            self.tokenizer.fingerprint,
            [(piece.sha256, piece.split, piece.offset, piece.length) for piece in self._pieces],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def verify(self) -> None:
        """Read every token. Raises `UserError`, which names the first piece that differs from the index."""
        for piece in self._pieces:
            self.tokens(piece)


def token_hash(ids: np.ndarray) -> str:
    """Return the SHA-256, in hex, of ids as stored in the file."""
    return hashlib.sha256(np.ascontiguousarray(ids, ids.dtype.newbyteorder("<")).data).hexdigest()


def read_index(path: str | os.PathLike) -> dict[str, Any]:
    """Read the corpus.json of a corpus and check its format. Raises `UserError`, which names the file."""
    file = Path(path) / INDEX
    if not file.exists():
        raise UserError(f"{path}: {explain_no_corpus(Path(path))}")
    index = read_json(file, "a prepared corpus")
    if not isinstance(index, dict):
        raise UserError(f"{file}: a {type(index).__name__}, expected the index of a corpus")
    if index.get("format") != FORMAT:
        raise UserError(f"{file}: format {index.get('format')!r}, expected {FORMAT}")
    kinds = {"tokenizer": str, "origin": dict, "dtype": str, "n_tokens": int, "pieces": list, "skipped": list}
    if index.keys() != kinds.keys() | {"format"}:
        raise UserError(f"{file}: keys {sorted(index)}, expected {sorted(kinds.keys() | {'format'})}")
    for key, kind in kinds.items():
        if not isinstance(index[key], kind) or isinstance(index[key], bool):
            raise UserError(f"{file}: {key} is a {type(index[key]).__name__}, expected {kind.__name__}")
    _check_entries(file, "pieces", index["pieces"], Piece)
    _check_entries(file, "skipped", index["skipped"], Skipped)
    return index


def _check_entries(file: Path, key: str, entries: list, entry_class: type) -> None:
    """Raise `UserError` unless the entries of a list have exactly the fields of their class, of the right types."""
    kinds = {field.name: {"str": str, "int": int, "float": (int, float)}[field.type] for field in fields(entry_class)}
    required = {field.name for field in fields(entry_class) if field.default is MISSING}
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or not required <= entry.keys() <= kinds.keys():
            found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
            raise UserError(f"{file}: {key}[{i}] has {found}, expected {sorted(kinds)}")
        for name, value in entry.items():
            if not isinstance(value, kinds[name]) or isinstance(value, bool):
                raise UserError(f"{file}: {key}[{i}].{name} is {shortened(value)}, expected another type")
            if not isinstance(value, str) and not -1 <= value <= MAX_NUMBER:  # false for NaN too
                raise UserError(f"{file}: {key}[{i}].{name} is {shortened(value)}, expected −1 to {MAX_NUMBER}")


def _pieces(file: Path, index: dict[str, Any]) -> list[Piece]:
    """Return the pieces of an index. Raises `UserError` unless they cover all tokens in order, in known splits."""
    pieces = [Piece(**entry) for entry in index["pieces"]]
    end = 0
    for i, piece in enumerate(pieces):
        if piece.offset != end or piece.length < 1:
            raise UserError(
                f"{file}: pieces[{i}] has offset {piece.offset} and length {piece.length}, "
                f"expected offset {end} and a length of at least 1"
            )
        if piece.split not in SPLITS:
            raise UserError(f"{file}: pieces[{i}] has split {piece.split!r}, expected one of {', '.join(SPLITS)}")
        end += piece.length
    if end != index["n_tokens"]:
        raise UserError(f"{file}: n_tokens {index['n_tokens']}, expected {end}, the sum over its pieces")
    return pieces


def count_by_split(pieces: Iterable[Piece]) -> dict[str, int]:
    """Return the number of pieces of each split that has any, in the order of `SPLITS`."""
    splits = [piece.split for piece in pieces]
    return {split: splits.count(split) for split in SPLITS if split in splits}
