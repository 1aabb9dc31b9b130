"""Write a corpus, piece by piece; it appears complete or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dsmr_mlx.common.files import sync
from dsmr_mlx.data.corpus import FORMAT, INDEX, TOKENIZER, TOKENS, Piece, Skipped, token_hash
from dsmr_mlx.tokenizers.base import Tokenizer


class CorpusWriter:
    """Writes a corpus piece by piece, so that only its index is held in memory.

    A context manager: `add` pieces, then `commit`, which alone makes anything appear at `out`. Leaving it
    without a commit, for whatever reason, removes what was written. What stands at `out` already is replaced
    by the commit; whether it may be is for the caller to decide.
    """

    def __init__(self, out: str | os.PathLike, tokenizer: Tokenizer) -> None:
        self.out = Path(out)
        self.tokenizer = tokenizer
        self.pieces: list[Piece] = []
        self.skipped: list[Skipped] = []
        self.n_tokens = 0
        self._folder = _beside(self.out, "partial")

    def __enter__(self) -> CorpusWriter:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._folder.mkdir()
        try:
            self._file = (self._folder / TOKENS).open("xb")
            self._write_header()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(
        self,
        ids: np.ndarray,
        *,
        source: str,
        split: str,
        composer: str = "",
        title: str = "",
        duration: float,
        notes: int,
        events: int | None = None,
        notes_encoded: int = -1,
        duration_encoded: float = -1.0,
    ) -> Piece:
        """Append a piece: ids (T,) with BOS and EOS, of the tokenizer's dtype; events: counted unless given.

        notes_encoded, duration_encoded: as in `Piece`; below 0 all notes, and the whole duration.
        """
        ids = _little_endian(ids, self.tokenizer.dtype)
        if events is None:
            events = len(ids) if self.tokenizer.token_events is None else len(self.tokenizer.to_events(ids))
        place = self.n_tokens, len(ids)
        back = notes_encoded, duration_encoded
        piece = Piece(source, split, composer, title, *place, duration, notes, token_hash(ids), events, *back)
        self._file.write(ids.tobytes())
        self.n_tokens += len(ids)
        self.pieces.append(piece)
        return piece

    def skip(self, source: str, reason: str) -> None:
        """Note a file that is left out."""
        self.skipped.append(Skipped(source, reason))

    def assign_splits(self, splits: dict[str, str]) -> None:
        """Set the split of pieces, by source: for who knows it only when all have been read."""
        self.pieces = [replace(piece, split=splits.get(piece.source, piece.split)) for piece in self.pieces]

    def commit(self, origin: dict[str, Any]) -> None:
        """Complete the corpus, flush it to disk and move it to `out`; origin: JSON values for the index."""
        self._file.seek(0)
        self._write_header()
        _flush(self._file)
        self._file.close()
        self.tokenizer.save(self._folder / TOKENIZER)
        index = {
            "format": FORMAT,
            "tokenizer": self.tokenizer.fingerprint,
            "origin": origin,
            "dtype": self.tokenizer.dtype.name,
            "n_tokens": self.n_tokens,
            "pieces": [asdict(piece) for piece in self.pieces],
            "skipped": [asdict(entry) for entry in self.skipped],
        }
        with (self._folder / INDEX).open("xb") as file:
            file.write((json.dumps(index, indent=1) + "\n").encode())
            _flush(file)
        _publish(self._folder, self.out)

    def _write_header(self) -> None:
        """The .npy header, written again when the length is known: NumPy leaves room in it for any length."""
        header = {
            "descr": self.tokenizer.dtype.newbyteorder("<").str,
            "fortran_order": False,
            "shape": (self.n_tokens,),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


def _little_endian(ids: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """ids in the file's type; ValueError if that would change them."""
    stored = np.asarray(ids).astype(dtype.newbyteorder("<"))
    if not np.array_equal(stored, ids):
        raise ValueError(f"ids do not fit {dtype}")
    return stored


def _beside(path: Path, suffix: str) -> Path:
    """A free hidden name in the same folder as `path`, so that a rename between the two is atomic."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{suffix}")


def _publish(folder: Path, out: Path) -> None:
    """Move a complete folder to `out`. What stands there is moved away first, and deleted last."""
    for inner in (folder / TOKENIZER, folder):
        sync(inner)
    old = _beside(out, "old")
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    try:
        sync(out.parent)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
