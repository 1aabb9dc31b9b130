"""Check and encode the ids that a player reads."""

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer


def prompt_ids(tokenizer: Tokenizer, prompt: np.ndarray | Notes | None) -> np.ndarray:
    """The ids that the model reads of a prompt, int64 `(T,)`, T ≥ 1; see `Tokenizer.prompt`."""
    return tokenizer.prompt(checked_ids(tokenizer, [] if prompt is None else prompt))


def checked_ids(tokenizer: Tokenizer, ids: np.ndarray | Notes) -> np.ndarray:
    """Ids or notes as ids `(T,)`. Raises `UserError` for ids outside the vocabulary and a FILL without a PLAY."""
    ids = np.ravel(tokenizer.encode_notes(ids) if isinstance(ids, Notes) else ids)
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"`prompt`: an array of {ids.dtype}, expected Notes or integer ids")
    if ids.size and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
        raise UserError(f"`prompt`: ids from {ids.min()} to {ids.max()}, expected 0 to {tokenizer.vocab_size - 1}")
    if tokenizer.fill_id is not None and tokenizer.shown_mask(ids)[-1:].any() and ids[-1] != tokenizer.play_id:
        raise UserError("`prompt`: a FILL without a PLAY after it")
    return ids
