"""The loss of a model on whole pieces, streamed in segments as in training."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus, Piece
from dsmr_mlx.data.lanes import Lanes
from dsmr_mlx.evaluation.estimates import Result, sums_within
from dsmr_mlx.model.base import WEIGHTS, find_base
from dsmr_mlx.model.checkpoint import lazy_arrays, weight_bytes
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.prefill import prefill

POSITION_RANGES = ((0, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096, 8192), (8192, None))  # [start, end)

Progress = Callable[[int, int], None]  # done, total


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
    """The mean loss of the predictions made after [start, end) tokens of a piece; `end` None: no limit."""

    start: int
    end: int | None
    tokens: int
    nats_per_token: float


@dataclass(frozen=True)
class Evaluation(Result):
    """Losses in nats. A piece of n + 1 ids has n predicted tokens: all but the first, EOS included.

    tokens, events: how many are predicted; an event is an id of the base vocabulary, equal to a token without subwords.
    notes, seconds: of the music; notes_encoded: notes recoverable from the tokens. Losses per note and per second
    compare models of any vocabularies that encode all notes, losses per event those with the same base vocabulary.
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


@dataclass(frozen=True)
class WeightInfo:
    """How a checkpoint stores its weights.

    parameters: their number before quantization; dtype: of the floats, or several joined by "and"; bits, group_size:
    of the quantized weights, None if there are none; bytes: size of the file, or of both with adapters; adapters:
    their rank, None if there are none.
    """

    parameters: int
    dtype: str
    bits: int | None
    group_size: int | None
    bytes: int
    adapters: int | None = None


@dataclass(frozen=True)
class EvaluatedCheckpoint:
    """A checkpoint, by the name that the user gave, with its weights and losses."""

    checkpoint: str
    weights: WeightInfo
    evaluation: Evaluation

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; those of the evaluation are not nested."""
        return {"checkpoint": self.checkpoint, "weights": asdict(self.weights), **self.evaluation.to_dict()}


def weight_info(model: DSMR, folder: Path) -> WeightInfo:
    """Return how the checkpoint `folder`, from which `model` was loaded, stores its weights."""
    lora = model.config.lora
    folders = [folder] if lora is None else [folder, find_base(folder).folder]
    stored = [array for each in folders for array in lazy_arrays(each / WEIGHTS).values()]
    dtypes = {array.dtype for array in stored if mx.issubdtype(array.dtype, mx.floating)}
    names = sorted(str(dtype).removeprefix("mlx.core.") for dtype in dtypes)
    quantization = model.config.quantization or {"bits": None, "group_size": None}
    rank, size = lora and lora["rank"], sum(map(weight_bytes, folders))
    return WeightInfo(model.n_parameters, " and ".join(names), **quantization, bytes=size, adapters=rank)


def check_vocabulary(model: DSMR, corpus: Corpus) -> None:
    """Raise `UserError` if corpus and model have vocabularies of different sizes."""
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
    progress: Progress | None = None,
) -> Evaluation:
    """Return the losses over the whole pieces of a split, or over a fixed sample of about `max_tokens` tokens.

    `progress(done, total)` counts tokens. Raises `UserError` if the split is empty or corpus and model have
    vocabularies of different sizes.
    """
    check_vocabulary(model, corpus)
    pieces = sample_pieces(corpus.pieces(split), max_tokens)
    losses = piece_losses(model, [corpus.tokens(piece) for piece in pieces], batch_size, progress)
    return summarize(corpus, pieces, losses)


def sample_pieces(pieces: Sequence[Piece], max_tokens: int | None) -> list[Piece]:
    """Return all pieces if `max_tokens` is None, else a fixed sample of about this many tokens, at least one piece.

    It is a systematic sample: every k-th of the pieces sorted by length, from a random start, k being all tokens over
    `max_tokens`. So every piece is equally likely, and short and long pieces are in proportion. A sample that must
    stay within the limit would prefer short pieces, one that must reach it long ones.
    """
    if max_tokens is None:
        return list(pieces)
    by_length = sorted(pieces, key=lambda piece: piece.length)
    n = max(round(len(pieces) * max_tokens / sum(piece.length for piece in pieces)), 1)
    step = max(len(pieces) / n, 1)
    return [by_length[int(place)] for place in np.arange(np.random.default_rng(0).random() * step, len(pieces), step)]


def piece_losses(
    model: DSMR,
    pieces: Sequence[np.ndarray],
    batch_size: int = 8,
    progress: Progress | None = None,
    first_position: int = 0,
) -> list[np.ndarray]:
    """Return for each piece of n + 1 ids its losses `(n,)` in nats, float32: `losses[i][t]` is that of token t + 1.

    At most `batch_size` lanes; fewer if the longest piece would leave some idle. first_position: the learned position
    of each piece's first id.
    """
    order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i]))  # longest first: lanes end together
    losses = [np.zeros(len(piece) - 1, np.float32) for piece in pieces]
    lengths, done = list(map(len, losses)), 0
    S, total = model.config.segment_length, sum(lengths)
    lanes = Lanes(lambda _, i: pieces[order[i]], len(pieces), busy_lanes(lengths, batch_size), S, epochs=1)
    state = model.new_state(len(lanes.lanes))
    for batch in lanes:
        state.reset(batch.fresh, first_position)
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


def busy_lanes(lengths: Sequence[int], most: int) -> int:
    """Return how many lanes pieces of these numbers of tokens keep busy, at most `most`: all over the longest one."""
    return min(most, -(-sum(lengths) // max(lengths, default=1)))


def last_losses(model: DSMR, ids: np.ndarray, n: int) -> np.ndarray:
    """Return the losses `(n,)` in nats, float32, of the last n < T of `ids` `(T,)`, after all ids before.

    Ids that they do not depend on are not read, see `model.prefill`.
    """
    state = model.new_state(1)
    for after, _ in prefill(model, ids[: -n - 1], state):
        state = after
        mx.eval(state.arrays)
    logits, _ = model(mx.array(ids[None, -n - 1 : -1], mx.int32), state)
    return np.array(nn.losses.cross_entropy(logits[0], mx.array(ids[-n:], mx.int32)))


def offset_progress(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return a progress callback for one part of a task of `total` steps, of which `before` are done."""
    return progress and (lambda done, _: progress(before + done, total))


def summarize(corpus: Corpus, pieces: Sequence[Piece], losses: Sequence[np.ndarray]) -> Evaluation:
    """Summarize the losses of pieces of a corpus, as returned by `piece_losses`."""
    total = float(sum(nats.sum(dtype=np.float64) for nats in losses))
    tokens = sum(map(len, losses))
    first = sum(len(corpus.tokenizer.to_events(corpus.tokens(piece)[:1])) for piece in pieces)  # not predicted
    events = sum(piece.events for piece in pieces) - first
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
    """Summarize the losses `(n,)` of one piece."""
    mean = float(nats.mean(dtype=np.float64))
    return PieceLoss(piece.source, piece.title, len(nats), mean, float(np.exp(mean)))


def loss_by_position(losses: Sequence[np.ndarray]) -> list[PositionLoss]:
    """Return the mean loss in each of `POSITION_RANGES` that has tokens."""
    rows = []
    for start, end in POSITION_RANGES:
        sums, counts = sums_within(losses, start, end)
        if tokens := int(counts.sum()):
            rows.append(PositionLoss(start, end, tokens, float(sums.sum() / tokens)))
    return rows
