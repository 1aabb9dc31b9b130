"""How well a model predicts whole pieces, streamed as it was trained."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus, Piece
from dsmr_mlx.data.lanes import Lanes
from dsmr_mlx.model.checkpoint import weight_bytes
from dsmr_mlx.model.dsmr import DSMR

POSITION_EDGES = (0, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class PieceLoss:
    """The mean loss of one piece."""

    source: str
    title: str
    tokens: int
    nats_per_token: float
    perplexity: float


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss of the predictions made after so many tokens of the piece, [start, end); end None: no limit."""

    start: int
    end: int | None
    tokens: int
    nats_per_token: float


@dataclass(frozen=True)
class Evaluation:
    """Losses in nats. A piece of n + 1 ids has n predicted tokens: all but the first, the end included.

    tokens, events: those predicted; an event is an id of the base vocabulary, which is a token where there are no
    subwords. notes, seconds: of the music; notes_encoded: how many of the notes the tokens say. What is per note or per
    second compares models of any vocabularies that say all notes, what is per event those whose vocabularies have the
    same base.
    """

    perplexity: float
    nats_per_token: float
    nats_per_event: float
    nats_per_note: float
    nats_per_second: float
    tokens: int
    events: int
    notes: int
    notes_encoded: int
    seconds: float
    pieces: int
    by_position: list[PositionLoss]
    by_piece: list[PieceLoss]  # best first

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Weights:
    """How a checkpoint stores its weights.

    parameters: their number, however they are stored; dtype: of those that are floats, several where they differ;
    bits, group_size: of those that are quantized, None where none is; bytes: of the file
    """

    parameters: int
    dtype: str
    bits: int | None
    group_size: int | None
    bytes: int


@dataclass(frozen=True)
class Measured:
    """A checkpoint, as it was named, and what was found."""

    checkpoint: str
    weights: Weights
    evaluation: Evaluation

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the figures of the evaluation stand beside the others."""
        return {"checkpoint": self.checkpoint, "weights": asdict(self.weights), **self.evaluation.to_dict()}


def stored_weights(model: DSMR, folder: Path) -> Weights:
    """How the weights of `model`, which was loaded from the checkpoint `folder`, are stored there."""
    stored = mx.load(str(folder / "model.safetensors"))  # lazily: their types are known without their values
    dtypes = {array.dtype for array in stored.values() if mx.issubdtype(array.dtype, mx.floating)}
    names = sorted(str(dtype).removeprefix("mlx.core.") for dtype in dtypes)
    quantization = model.config.quantization or {"bits": None, "group_size": None}
    return Weights(model.n_parameters, " and ".join(names), **quantization, bytes=weight_bytes(folder))


def check_vocabulary(model: DSMR, corpus: Corpus) -> None:
    """Raise `UserError` if the corpus has another vocabulary than the model."""
    if corpus.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{corpus.path}: vocabulary of {corpus.vocab_size} tokens, the model has {model.config.vocab_size}"
        )


def evaluate(
    model: DSMR,
    corpus: Corpus,
    split: str = "validation",
    *,
    batch_size: int = 8,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Loss over whole pieces of a split; with `max_tokens` over a fixed sample of pieces of about so many tokens.

    `progress(done, total)` is called with numbers of tokens. Raises `UserError` if the split is empty or the
    corpus has another vocabulary than the model.
    """
    check_vocabulary(model, corpus)
    pieces = sample_pieces(corpus.pieces(split), max_tokens)
    losses = piece_losses(model, [corpus.tokens(piece) for piece in pieces], batch_size, progress)
    return summarize(pieces, losses)


def sample_pieces(pieces: Sequence[Piece], max_tokens: int | None) -> list[Piece]:
    """All pieces, or of a fixed shuffle the first ones up to `max_tokens`, at least one."""
    if max_tokens is None:
        return list(pieces)
    sample, total = [], 0
    for i in np.random.default_rng(0).permutation(len(pieces)):
        if sample and total + pieces[i].length > max_tokens:
            continue
        sample.append(pieces[i])
        total += pieces[i].length
    return sample


def piece_losses(
    model: DSMR,
    pieces: Sequence[np.ndarray],
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """For each piece of n + 1 ids its n losses in nats, float32: `losses[i][t]` is that of token t + 1.

    `batch_size` lanes at most: no more than can be kept busy while the longest piece is read.
    """
    order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i]))  # longest first: lanes end together
    losses = [np.zeros(len(piece) - 1, np.float32) for piece in pieces]
    total, done = sum(map(len, losses)), 0
    busy = -(-total // max(map(len, losses), default=1))
    lanes = Lanes(
        lambda _, i: pieces[order[i]],
        len(pieces),
        min(batch_size, busy),
        model.config.segment_length,
        epochs=1,
    )
    state = model.new_state(len(lanes.lanes))
    for batch in lanes:
        state.reset(batch.fresh)
        hidden, state = model.advance(mx.array(batch.inputs), state, batch.counts)
        nats = nn.losses.cross_entropy(model.logits(hidden), mx.array(batch.targets))
        mx.eval(nats, state.arrays)
        for row, n, piece, offset in zip(np.array(nats), batch.counts, batch.pieces, batch.offsets, strict=True):
            if piece >= 0:
                losses[order[piece]][offset : offset + n] = row[:n]
        done += batch.n_tokens
        if progress:
            progress(done, total)
    return losses


def summarize(pieces: Sequence[Piece], losses: Sequence[np.ndarray]) -> Evaluation:
    """What the losses of pieces, as from `piece_losses`, come to."""
    total = float(sum(nats.sum(dtype=np.float64) for nats in losses))
    tokens = sum(map(len, losses))
    events = sum(piece.events - 1 for piece in pieces)  # BOS, an event too, is given
    notes = sum(piece.notes for piece in pieces)
    seconds = sum(piece.duration for piece in pieces)
    return Evaluation(
        perplexity=float(np.exp(total / tokens)),
        nats_per_token=total / tokens,
        nats_per_event=total / events,
        nats_per_note=total / max(notes, 1),
        nats_per_second=total / max(seconds, 1e-9),
        tokens=tokens,
        events=events,
        notes=notes,
        notes_encoded=sum(piece.notes_encoded for piece in pieces),
        seconds=seconds,
        pieces=len(pieces),
        by_position=loss_by_position(losses),
        by_piece=sorted(map(piece_loss, pieces, losses), key=lambda piece: piece.nats_per_token),
    )


def piece_loss(piece: Piece, nats: np.ndarray) -> PieceLoss:
    mean = float(nats.mean(dtype=np.float64))
    return PieceLoss(piece.source, piece.title, len(nats), mean, float(np.exp(mean)))


def loss_by_position(losses: Iterable[np.ndarray]) -> list[PositionLoss]:
    """Loss by how many predictions of the piece came before; empty ranges are left out."""
    losses = list(losses)
    rows = []
    for start, end in zip(POSITION_EDGES, (*POSITION_EDGES[1:], None), strict=True):
        inside = np.concatenate([nats[start:end] for nats in losses])
        if len(inside):
            rows.append(PositionLoss(start, end, len(inside), float(inside.mean(dtype=np.float64))))
    return rows
