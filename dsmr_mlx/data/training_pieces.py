"""A piece as training reads it in an epoch. MLX and PyTorch train on the same ids."""

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.augmentation import ANNOUNCED, Augmentation, announce_end, augment
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.gaps import check_fill, with_gaps
from dsmr_mlx.tokenizers.base import Tokenizer


def training_ids(
    tokenizer: Tokenizer, ids: np.ndarray, augmentation: Augmentation, fill: float, seed: int, epoch: int, piece: int
) -> np.ndarray:
    """Return the ids `(T′,)` of a piece in an epoch, from its ids `(T,)` in the corpus.

    The piece is augmented, its end announced, and gaps shown. A pure function of its arguments.
    """
    ids = augment(tokenizer, ids, augmentation, seed, epoch, piece)
    ids = announce_end(tokenizer, ids, seed, epoch, piece)
    return with_gaps(tokenizer, ids, fill, seed, epoch, piece)


def check_training(corpus: Corpus, augmentation: Augmentation, fill: float, max_positions: int | None) -> None:
    """Raise `UserError` if a corpus does not allow augmentation, gaps or a table of `max_positions` positions."""
    check_fill(corpus.tokenizer, fill)
    if not corpus.tokenizer.decodes and augmentation != Augmentation():
        raise UserError(f"{_wanted(augmentation)}: the ids of {corpus.path} do not decode to notes, expected 0")
    if max_positions is not None and corpus.tokenizer.token_events is not None and augmentation != Augmentation():
        raise UserError(f"{_wanted(augmentation)}: expected 0 with max_positions: other events may need more subwords")
    for piece in corpus.pieces() if max_positions is not None else ():
        length = piece.length
        if piece.split == "train" and length == max_positions + 1:  # one more id, if the end is announced
            length = len(corpus.tokenizer.with_announced_end(corpus.tokens(piece), ANNOUNCED[0]))
        if piece.split != "test" and length > max_positions + 1:
            raise UserError(
                f"{corpus.path}: {piece.source} has {length:,} tokens, expected at most {max_positions + 1:,}: "
                "the model has no more learned positions (max_positions)"
            )


def _wanted(augmentation: Augmentation) -> str:
    return ", ".join(f"augment_{name} = {value}" for name, value in vars(augmentation).items() if value)
