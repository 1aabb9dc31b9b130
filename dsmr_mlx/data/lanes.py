"""Lanes: B pieces read side by side, each from its first token to its last, in segments of S tokens.

When a piece ends, its lane opens the next piece at the next segment. `Batch.fresh` lists these lanes; the code that
runs the model resets them, with `RecurrentState.reset`. The sequence of pieces is a pure function of (seed, epoch), so
a stream is resumed by seeking, never by replaying.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np

from dsmr_mlx.common.errors import UserError

LoadPiece = Callable[[int, int], np.ndarray]  # (epoch, piece index) → ids (T,)


@dataclass(frozen=True)
class Batch:
    """One segment of every lane. Shapes never change.

    inputs, targets: `(B, S)` int32; `targets[b, i]` follows `inputs[b, i]` in the piece; padding is 0
    weights: `(B, S)` float32, of the targets in the loss: 1, or 0 for padding and shown ids
    counts:  `(B,)`, number of inputs in each lane, before padding
    fresh:   lanes whose piece starts with this segment: reset their memory first
    pieces:  `(B,)`, index of each lane's piece; −1 if the lane is idle
    offsets: `(B,)`, position in its piece of each lane's first input
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    counts: np.ndarray
    fresh: list[int]
    pieces: np.ndarray
    offsets: np.ndarray

    @property
    def n_tokens(self) -> int:
        """Number of targets that count in the loss; may be 0."""
        return int(np.count_nonzero(self.weights))


@dataclass
class Lane:
    """The state of one lane.

    draw: index of its piece in the sequence of all epochs; offset: tokens of the piece already used as inputs
    piece, tokens: the piece's index and ids; weights: `(T,)` float32, of each token as a target
    """

    draw: int
    offset: int
    piece: int
    tokens: np.ndarray
    weights: np.ndarray


class Lanes:
    """An iterator of `Batch`es over whole pieces.

    load:     called with an epoch and the index of a piece, returns the piece's ids, at least 2
    n_pieces: number of pieces in an epoch
    seed:     shuffles each epoch differently; None: the order 0, 1, 2, …
    epochs:   number of epochs; None: no end
    shown:    returns a mask `(T,)` of the ids of a piece that are not targets, see `Tokenizer.shown_mask`; None: none

    Raises `UserError` if there are no pieces, or a piece is too short.
    """

    def __init__(
        self,
        load: LoadPiece,
        n_pieces: int,
        batch_size: int,
        segment_length: int,
        seed: int | None = None,
        epochs: int | None = None,
        shown: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        if n_pieces < 1:
            raise UserError("no pieces to stream")
        self.load = load
        self.n_pieces = n_pieces
        self.segment_length = segment_length
        self.seed = seed
        self.epochs = epochs
        self.shown = shown
        self.drawn = 0
        self.lanes: list[Lane | None] = [None] * batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        B, S = len(self.lanes), self.segment_length
        inputs, targets, weights = (np.zeros((B, S), dtype) for dtype in (np.int32, np.int32, np.float32))
        counts, pieces, offsets = np.zeros(B, np.int64), np.full(B, -1), np.zeros(B, np.int64)
        fresh = []
        for b in range(B):
            if self.lanes[b] is None:  # its piece has ended, or nothing was read yet
                self.lanes[b] = self._draw()
                fresh.append(b)
            if (lane := self.lanes[b]) is None:
                continue
            chunk = lane.tokens[lane.offset : lane.offset + S + 1]
            n = len(chunk) - 1
            inputs[b, :n], targets[b, :n] = chunk[:-1], chunk[1:]
            weights[b, :n] = lane.weights[lane.offset + 1 : lane.offset + n + 1]
            counts[b], pieces[b], offsets[b] = n, lane.piece, lane.offset
            lane.offset += n
            if lane.offset == len(lane.tokens) - 1:
                self.lanes[b] = None
        if not counts.any():
            raise StopIteration
        return Batch(inputs, targets, weights, counts, fresh, pieces, offsets)

    def _draw(self) -> Lane | None:
        """Open the next piece of the sequence; None after the last epoch."""
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
            raise UserError(f"piece {piece}: the stream stopped at token {offset}, but the piece has {len(tokens)}")
        weights = np.ones(len(tokens), np.float32)
        if self.shown is not None:
            weights[self.shown(tokens)] = 0
        return Lane(draw, offset, piece, tokens, weights)

    def cursor(self) -> dict[str, Any]:
        """Return the position of the stream as JSON values; see `seek`."""
        return {"drawn": self.drawn, "lanes": [lane and [lane.draw, lane.offset] for lane in self.lanes]}

    def seek(self, cursor: dict[str, Any]) -> Self:
        """Continue at a position that `cursor` returned. Raises `UserError` if the lanes or pieces differ."""
        if len(cursor["lanes"]) != len(self.lanes):
            expected = f"expected {len(cursor['lanes'])}, as in the resumed stream"
            raise UserError(f"batch_size = {len(self.lanes)}: {expected}")
        self.drawn = cursor["drawn"]
        self.lanes = [place and self._open(*place) for place in cursor["lanes"]]
        return self


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n_pieces: int) -> np.ndarray:
    """Return the order of an epoch's pieces, a permutation; a pure function of the arguments."""
    # Not a Generator: its draws may differ between NumPy versions, and a run may be resumed with another version.
    return np.argsort(np.random.SeedSequence([seed, epoch]).generate_state(n_pieces, np.uint64), kind="stable")
