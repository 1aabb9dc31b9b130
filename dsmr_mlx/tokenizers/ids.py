"""A vocabulary of known size and unknown meaning, for models converted from other programs: ids in, ids out."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NoReturn

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.limits import MAX_SIZES
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer

MAX_IDS = MAX_SIZES["vocab_size"]


class IdTokenizer(Tokenizer):
    """The ids 0..vocab_size − 1 of the vocabulary `name`, with the special ids that are known.

    pad_id, bos_id, eos_id: None if absent or unknown; two may be equal. A prompt is read unchanged,
    because the places of special ids are unknown too. Raises `UserError` for an invalid size, name or id.
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
        if not _is_integer(vocab_size) or not 1 <= vocab_size <= MAX_IDS:
            raise UserError(f"`vocab_size` {vocab_size!r}: expected an integer from 1 to {MAX_IDS:,}")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"`name` {name!r}: expected the name of the vocabulary")
        special = {"pad_id": pad_id, "bos_id": bos_id, "eos_id": eos_id}
        for key, value in special.items():
            if value is not None and not (_is_integer(value) and 0 <= value < vocab_size):
                raise UserError(f"`{key}` {value!r}: expected an integer from 0 to {vocab_size - 1}, or none")
        self._parameters = {"vocab_size": vocab_size, "name": name, **special}

    @property
    def name(self) -> str:
        """The name of the vocabulary."""
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
    def why_not(self) -> str:
        """See `Tokenizer.why_not`."""
        return (
            f"the vocabulary of {self.name} is not part of this program: it can neither encode MIDI nor decode ids; "
            "if the ids are those of a known tokenizer, dsmr-mlx convert MODEL NEW --tokenizer adds it; "
            "from Python, dsmr_mlx.generate(model, tokenizer, prompt=ids, tokens=N) works on ids"
        )

    def encode(self, midi: object) -> NoReturn:
        """Raise `UserError`."""
        raise UserError(self.why_not)

    def encode_notes(self, notes: Notes) -> NoReturn:
        """Raise `UserError`."""
        raise UserError(self.why_not)

    def decode(self, ids: object) -> Notes:
        """Return no notes: the meaning of the ids is unknown."""
        return Notes.empty()

    def prompt(self, ids: np.ndarray) -> np.ndarray:
        """Return the ids `(T,)` unchanged as int64, or BOS if there are none; `UserError` if BOS is then unknown."""
        if len(ids):
            return ids.astype(np.int64)
        if self.bos_id is None:
            raise UserError(f"`prompt`: empty, expected ids: the BOS of the vocabulary of {self.name} is unknown")
        return np.array([self.bos_id], np.int64)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
