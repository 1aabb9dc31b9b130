"""The value of a model's memory: how much the loss rises after a boundary at which all memory is emptied.

A piece is read with its memory kept, and again with keys, values and convolution inputs emptied after N tokens. The
model has no other access to the first N tokens, so the second reading is like that of a piece that begins there, except
that learned positions go on counting. The gain is the loss of the second reading minus that of the first, of the same
tokens. The DSMR paper shows it by distance from the boundary, as "KRCU" at N = 8,192 (arXiv 2602.19816, version 3).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus, Piece
from dsmr_mlx.evaluation.estimates import Estimate, Result, estimate, sums_within
from dsmr_mlx.evaluation.losses import Progress, check_vocabulary, offset_progress, piece_losses, sample_pieces
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.horizons import model_reach

RESET_AT = 8192  # tokens: the default boundary, that of the paper
WINDOW = 8192  # tokens after the boundary over which the gain is averaged
FIRST_RANGE = 16  # tokens: distances are divided at 16, 32, 64, …


@dataclass(frozen=True)
class DistanceGain:
    """The tokens read at distances [start, end) from the boundary, and the predictions made after each of them.

    The first token after the boundary has distance 0. kept, emptied: nats per token with the memory kept and emptied;
    gain: emptied − kept, with its error over the `pieces` that go on this far.
    """

    start: int
    end: int
    pieces: int
    tokens: int
    kept: float
    emptied: float
    gain: Estimate


@dataclass(frozen=True)
class ResetCurve(Result):
    """The gain of the memory after `reset_at` tokens, over the next `window` tokens and by distance.

    pieces: those longer than `reset_at`; left_out: the others. tokens, kept, emptied, gain: of the first `window`
    tokens after the boundary, fewer if a piece ends, as in `DistanceGain`. by_distance: up to the end of each piece.
    reach: see `model_reach`; the gain is 0 in segments that begin as many tokens after the boundary or more.
    """

    reset_at: int
    window: int
    pieces: int
    left_out: int
    tokens: int
    kept: float
    emptied: float
    gain: Estimate
    segment_length: int
    horizons: list[int]
    reach: int
    by_distance: list[DistanceGain]


def reset_curve(
    model: DSMR,
    corpus: Corpus,
    split: str = "validation",
    *,
    reset_at: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> ResetCurve:
    """Measure the gain of the memory after `reset_at` tokens; None: about `RESET_AT`, a multiple of the segment.

    max_tokens: take a fixed sample of pieces with about this many tokens. `progress(done, total)` counts the tokens of
    both readings; the first `reset_at` tokens are read once. Raises `UserError` as `losses.evaluate` and
    `check_reset_at` do.
    """
    check_vocabulary(model, corpus)
    pieces = sample_pieces(corpus.pieces(split), max_tokens)
    reset_at = check_reset_at(model.config, pieces, reset_at)
    long_enough = [piece for piece in pieces if goes_past(piece.length, reset_at)]
    ids, works = [corpus.tokens(piece) for piece in long_enough], [piece.work for piece in long_enough]
    first = sum(len(piece) - 1 for piece in ids)
    total = 2 * first - len(ids) * reset_at
    losses = piece_losses(model, ids, batch_size, offset_progress(progress, 0, total))
    update = offset_progress(progress, first, total)
    curve = measure_reset(model, ids, losses, reset_at, works, batch_size=batch_size, progress=update)
    return replace(curve, left_out=len(pieces) - len(ids))


def check_reset_at(config: ModelConfig, pieces: Sequence[Piece], reset_at: int | None = None) -> int:
    """Return the boundary in tokens; None: the multiple of the segment length S closest to `RESET_AT`.

    Raises `UserError` if it is not a multiple of S, at least S, or if none of the pieces goes past it.
    """
    S = config.segment_length
    if reset_at is None:
        reset_at = max(round(RESET_AT / S), 1) * S
    if reset_at < S or reset_at % S:
        near = sorted({max(n * S, S) for n in (reset_at // S, reset_at // S + 1)})
        multiples = " or ".join(f"{n:,}" for n in near)
        raise UserError(f"`reset_at` {reset_at:,}: expected a multiple of the segment length {S}, such as {multiples}")
    longest = max(piece.length for piece in pieces)
    if not goes_past(longest, reset_at):
        raise UserError(
            f"`reset_at` {reset_at:,}: expected less, the longest of {len(pieces)} pieces has {longest:,} tokens"
        )
    return reset_at


def goes_past(length: int, reset_at: int) -> bool:
    """Return whether a piece of `length` ids has a token after the boundary, and another one to be predicted."""
    return length > reset_at + 1


def measure_reset(
    model: DSMR,
    ids: Sequence[np.ndarray],
    losses: Sequence[np.ndarray],
    reset_at: int,
    works: Sequence[Hashable],
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> ResetCurve:
    """Measure the gain of the memory after `reset_at` tokens on pieces whose losses are already known.

    ids: of whole pieces; losses: those that `piece_losses` returned for them; works: of the pieces. Only the rest of
    each piece is read.
    """
    past = [i for i, piece in enumerate(ids) if goes_past(len(piece), reset_at)]
    rests, kept, works = (
        [ids[i][reset_at:] for i in past],
        [losses[i][reset_at:] for i in past],
        [works[i] for i in past],
    )
    emptied = piece_losses(model, rests, batch_size, progress, first_position=reset_at)
    mean = distance_gain(kept, emptied, works, 0, WINDOW)
    rows = [distance_gain(kept, emptied, works, *limits) for limits in distance_ranges(max(map(len, kept)))]
    c = model.config
    return ResetCurve(
        reset_at,
        WINDOW,
        pieces=len(rests),
        left_out=len(ids) - len(rests),
        tokens=mean.tokens,
        kept=mean.kept,
        emptied=mean.emptied,
        gain=mean.gain,
        segment_length=c.segment_length,
        horizons=list(c.horizons),
        reach=model_reach(c),
        by_distance=rows,
    )


def distance_ranges(n: int) -> list[tuple[int, int]]:
    """Return the ranges [0, 16), [16, 32), [32, 64), … that contain the distances 0 … n − 1."""
    edges = [0, FIRST_RANGE]
    while edges[-1] < n:
        edges.append(2 * edges[-1])
    return list(pairwise(edges))


def distance_gain(
    kept: Sequence[np.ndarray], emptied: Sequence[np.ndarray], works: Sequence[Hashable], start: int, end: int
) -> DistanceGain:
    """Summarize distances [start, end); kept, emptied: the losses `(n,)` of each piece after the boundary."""
    (with_memory, counts), (without, _) = (sums_within(losses, start, end) for losses in (kept, emptied))
    return DistanceGain(
        start,
        end,
        pieces=int(np.count_nonzero(counts)),
        tokens=int(counts.sum()),
        kept=estimate(with_memory, counts, works).nats,
        emptied=estimate(without, counts, works).nats,
        gain=estimate(without - with_memory, counts, works),
    )
