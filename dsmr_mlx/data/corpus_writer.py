"""Write a corpus piece by piece. It appears complete or not at all."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from dsmr_mlx.common.files import sync, write_atomically
from dsmr_mlx.common.folders import commit_folder, temporary_folder
from dsmr_mlx.data.corpus import FORMAT, INDEX, TOKENIZER, TOKENS, Piece, Skipped, token_hash
from dsmr_mlx.tokenizers.base import Tokenizer


class CorpusWriter:
    """A context manager that writes a corpus piece by piece, with only its index in memory.

    Call `add` for each piece, then `commit`, which moves the corpus to `out`; with `replace`, it replaces what is
    there. Leaving the block without a commit removes everything written.
    """

    def __init__(self, out: str | os.PathLike, tokenizer: Tokenizer, replace: bool = True) -> None:
        self.out = Path(out).resolve()
        self.tokenizer, self.replace = tokenizer, replace
        self.pieces: list[Piece] = []
        self.skipped: list[Skipped] = []
        self.n_tokens = 0

    def __enter__(self) -> CorpusWriter:
        with ExitStack() as stack:
            self._folder = stack.enter_context(temporary_folder(self.out))
            self._file = stack.enter_context((self._folder / TOKENS).open("xb"))
            self._write_header()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

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
        repairs: str = "",
    ) -> Piece:
        """Append a piece and return its entry.

        ids: `(T,)` with BOS and EOS; events: counted if None; notes_encoded, duration_encoded: negative for all notes
        and the whole duration. For the others see `Piece`. Raises `ValueError` if ids do not fit the tokenizer's dtype.
        """
        ids = _little_endian(ids, self.tokenizer.dtype)
        if events is None:
            events = len(ids) if self.tokenizer.token_events is None else len(self.tokenizer.to_events(ids))
        piece = Piece(
            source=source,
            split=split,
            composer=composer,
            title=title,
            offset=self.n_tokens,
            length=len(ids),
            duration=duration,
            notes=notes,
            sha256=token_hash(ids),
            events=events,
            notes_encoded=notes_encoded,
            duration_encoded=duration_encoded,
            repairs=repairs,
        )
        self._file.write(ids.tobytes())
        self.n_tokens += len(ids)
        self.pieces.append(piece)
        return piece

    def skip(self, source: str, reason: str) -> None:
        """Record a file that is left out."""
        self.skipped.append(Skipped(source, reason))

    def assign_splits(self, splits: dict[str, str]) -> None:
        """Set the split of pieces, by source; for callers that assign splits at the end."""
        self.pieces = [replace(piece, split=splits.get(piece.source, piece.split)) for piece in self.pieces]

    def commit(self, origin: dict[str, Any]) -> None:
        """Flush the corpus to disk and move it to `out`; origin: JSON values for the index."""
        self._file.seek(0)
        self._write_header()
        self._file.close()
        sync(self._folder / TOKENS)
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
        write_atomically(self._folder / INDEX, json.dumps(index, indent=1) + "\n")
        commit_folder(self._folder, self.out, self.replace)

    def _write_header(self) -> None:
        """Write the .npy header, again once the length is known; NumPy leaves room in it for any length."""
        header = {
            "descr": self.tokenizer.dtype.newbyteorder("<").str,
            "fortran_order": False,
            "shape": (self.n_tokens,),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


def _little_endian(ids: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return ids in the file's dtype. Raises `ValueError` if that would change them."""
    stored = np.asarray(ids).astype(dtype.newbyteorder("<"))
    if not np.array_equal(stored, ids):
        raise ValueError(f"`ids` do not fit {dtype}")
    return stored
