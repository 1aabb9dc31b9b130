"""Lanes: B pieces read side by side, each from its first token to its last, in segments of S.

When a piece ends, its lane alone starts the next one with the following segment. The sequence of pieces is a
pure function of (seed, epoch), so a stream is resumed by seeking, never by replaying.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np

from dsmr_mlx.common.errors import UserError

LoadPiece = Callable[[int, int], np.ndarray]  # (epoch, piece index) -> token ids [length]


@dataclass(frozen=True)
class Batch:
    """One segment of every lane; shapes never change.

    inputs, targets: `[B, S]` int32; `targets[b, i]` follows `inputs[b, i]` in the piece, padding is 0
    counts:  `[B]` how many targets of the lane are real (they come first)
    fresh:   lanes whose piece begins with this segment: their memory must be empty
    pieces:  `[B]` index of each lane's piece, −1 where the lane is idle
    offsets: `[B]` position in the piece of the lane's first input
    """

    inputs: np.ndarray
    targets: np.ndarray
    counts: np.ndarray
    fresh: list[int]
    pieces: np.ndarray
    offsets: np.ndarray

    @property
    def n_tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def weights(self) -> np.ndarray:
        """`[B, S]` float32: 1 for real targets, 0 for padding."""
        return (np.arange(self.targets.shape[1]) < self.counts[:, None]).astype(np.float32)


@dataclass
class Lane:
    """draw: which piece of the sequence the lane reads; offset: tokens of it already used as inputs."""

    draw: int
    offset: int
    piece: int
    tokens: np.ndarray


class Lanes:
    """An iterator of `Batch`es over whole pieces.

    n_pieces: pieces in an epoch; `load(epoch, piece)` gives the ids of one, at least 2
    epochs:   None to go on for ever
    seed:     shuffles each epoch differently; None keeps the order 0, 1, 2, …
    """

    def __init__(
        self,
        load: LoadPiece,
        n_pieces: int,
        batch_size: int,
        segment_length: int,
        seed: int | None = None,
        epochs: int | None = None,
    ):
        if n_pieces < 1:
            raise UserError("no pieces to stream")
        self.load = load
        self.n_pieces = n_pieces
        self.segment_length = segment_length
        self.seed = seed
        self.epochs = epochs
        self.drawn = 0
        self.lanes: list[Lane | None] = [None] * batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        B, S = len(self.lanes), self.segment_length
        inputs, targets = np.zeros((B, S), np.int32), np.zeros((B, S), np.int32)
        counts, pieces, offsets = np.zeros(B, np.int64), np.full(B, -1), np.zeros(B, np.int64)
        fresh = []
        for b in range(B):
            if self.lanes[b] is None:
                self.lanes[b] = self._draw()
                fresh.append(b)
            if (lane := self.lanes[b]) is None:
                continue
            chunk = lane.tokens[lane.offset : lane.offset + S + 1]
            n = len(chunk) - 1
            inputs[b, :n], targets[b, :n] = chunk[:-1], chunk[1:]
            counts[b], pieces[b], offsets[b] = n, lane.piece, lane.offset
            lane.offset += n
            if lane.offset == len(lane.tokens) - 1:
                self.lanes[b] = None
        if not counts.any():
            raise StopIteration
        return Batch(inputs, targets, counts, fresh, pieces, offsets)

    def _draw(self) -> Lane | None:
        """The next piece of the sequence, or None when the last epoch is used up."""
        lane = self._open(self.drawn, 0)
        self.drawn += lane is not None
        return lane

    def _open(self, draw: int, offset: int) -> Lane | None:
        epoch, place = divmod(draw, self.n_pieces)
        if self.epochs is not None and epoch >= self.epochs:
            return None
        piece = place if self.seed is None else int(epoch_order(self.seed, epoch, self.n_pieces)[place])
        tokens = self.load(epoch, piece)
        if len(tokens) < 2:
            raise UserError(f"piece {piece}: found {len(tokens)} tokens, expected at least 2")
        if offset >= len(tokens) - 1:
            raise UserError(f"piece {piece}: the stream was left at token {offset}, but it has {len(tokens)}")
        return Lane(draw, offset, piece, tokens)

    def cursor(self) -> dict[str, Any]:
        """Where the stream stands, as JSON values: enough to go on exactly here."""
        return {"drawn": self.drawn, "lanes": [lane and [lane.draw, lane.offset] for lane in self.lanes]}

    def seek(self, cursor: dict[str, Any]) -> Self:
        """Go to a place that `cursor` gave. Raises `UserError` for another number of lanes."""
        if len(cursor["lanes"]) != len(self.lanes):
            raise UserError(f"batch_size = {len(self.lanes)}: the stream was left with {len(cursor['lanes'])} lanes")
        self.drawn = cursor["drawn"]
        self.lanes = [place and self._open(*place) for place in cursor["lanes"]]
        return self


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n_pieces: int) -> np.ndarray:
    """The permutation of an epoch's pieces: a pure function of its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(n_pieces)
