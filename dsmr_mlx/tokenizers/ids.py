"""A vocabulary of which only the size is known: ids in, ids out, no notes.

For models converted from programs whose tokenizer is not part of this one.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NoReturn

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer

MOST_IDS = 1 << 24


class IdTokenizer(Tokenizer):
    """Ids 0..vocab_size − 1 of the vocabulary called `name`, with those special ids that are known.

    pad_id, bos_id, eos_id: None where there is none, or it is not known; two may be the same. A prompt is read as
    it is given, for where such a vocabulary puts its special ids is not known either. Raises `UserError` for a
    size, a name or an id that cannot be.
    """

    kind = "ids"
    version = 1

    def __init__(
        self,
        vocab_size: int,
        name: str,
        pad_id: int | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
    ) -> None:
        if not _is_integer(vocab_size) or not 1 <= vocab_size <= MOST_IDS:
            raise UserError(f"vocab_size = {vocab_size!r}: expected an integer from 1 to {MOST_IDS:,}")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"name = {name!r}: expected the name of the vocabulary")
        special = {"pad_id": pad_id, "bos_id": bos_id, "eos_id": eos_id}
        for key, value in special.items():
            if value is not None and not (_is_integer(value) and 0 <= value < vocab_size):
                raise UserError(f"{key} = {value!r}: expected an integer from 0 to {vocab_size - 1}, or none")
        self._parameters = {"vocab_size": vocab_size, "name": name, **special}

    @property
    def name(self) -> str:
        """What the vocabulary is called."""
        return self._parameters["name"]

    @property
    def parameters(self) -> dict[str, Any]:
        """See `Tokenizer.parameters`."""
        return dict(self._parameters)

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The ids themselves, as text."""
        return tuple(map(str, range(self.vocab_size)))

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        return self._parameters["vocab_size"]

    @property
    def pad_id(self) -> int | None:
        """See `Tokenizer.pad_id`."""
        return self._parameters["pad_id"]

    @property
    def bos_id(self) -> int | None:
        """See `Tokenizer.bos_id`."""
        return self._parameters["bos_id"]

    @property
    def eos_id(self) -> int | None:
        """See `Tokenizer.eos_id`."""
        return self._parameters["eos_id"]

    @property
    def no_notes(self) -> str:
        """See `Tokenizer.no_notes`."""
        return (
            f"the vocabulary of {self.name} is not part of this program: MIDI cannot be turned into its ids, nor its "
            "ids into MIDI; from Python, dsmr_mlx.generate(model, tokenizer, prompt=ids, tokens=N) works on ids"
        )

    def encode(self, midi: object) -> NoReturn:
        """Raises `UserError`, whatever it is given."""
        raise UserError(self.no_notes)

    def encode_notes(self, notes: Notes) -> NoReturn:
        """Raises `UserError`, whatever it is given."""
        raise UserError(self.no_notes)

    def decode(self, ids: object) -> Notes:
        """No notes: what the ids mean is not known."""
        return Notes.empty()

    def prompt(self, ids: np.ndarray) -> np.ndarray:
        """The ids (T,) as they are, BOS for none; int64. Raises `UserError` for none where BOS is not known."""
        if len(ids):
            return ids.astype(np.int64)
        if self.bos_id is None:
            raise UserError(f"prompt: how a piece begins in the vocabulary of {self.name} is not known, expected ids")
        return np.array([self.bos_id], np.int64)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
