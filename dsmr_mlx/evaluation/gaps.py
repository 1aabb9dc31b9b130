"""How much a model gains from being shown what follows a gap.

In whole pieces, a model is shown what follows some passages, as in training, and the losses of the true passages are
compared with those of the same pieces with nothing shown. Then passages are put into gaps: the true one, one played
with what follows shown, one played with nothing shown, and one from another piece. The better a passage joins, the
likelier the same model, with nothing shown, finds what follows.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus, Piece
from dsmr_mlx.data.gaps import Gap, draw_gaps, show_gaps, with_lead
from dsmr_mlx.evaluation.estimates import Estimate, Result, estimate
from dsmr_mlx.evaluation.losses import Progress, check_vocabulary, offset_progress, piece_losses, sample_pieces
from dsmr_mlx.generation.foresight import why_no_gaps
from dsmr_mlx.generation.gap_player import GapPlayer, Reader
from dsmr_mlx.generation.joins import score_passage
from dsmr_mlx.generation.player import Player
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.music.gapped import GappedMusic, replaced
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer

LENGTHS = (2, 4, 8, 16, 30)  # seconds: gaps are grouped between these
ROUNDS = 2  # readings of each piece, with different gaps
JOINS, JOIN_SECONDS = 16, 8.0  # gaps into which passages are put, and their length
KINDS = {  # of passages
    "true": "the true one",
    "shown": "played, what follows shown",
    "continued": "played, nothing shown",
    "foreign": "of another piece",
}


@dataclass(frozen=True)
class LengthGain:
    """Gaps of [start, end) seconds: nats per note of the true passages with what follows shown, and with nothing shown.

    gain: nothing shown − shown, with its error over works.
    """

    start: float
    end: float
    pieces: int
    gaps: int
    notes: int
    shown: Estimate
    nothing: Estimate
    gain: Estimate


@dataclass(frozen=True)
class JoinedKind:
    """How passages of one kind join, in nats per note, with errors over works.

    kind: of the passage, one of `KINDS`
    passage: of the passage; following: of the first seconds after it; cost: of these, compared with the true passage
    """

    kind: str
    passage: Estimate
    following: Estimate
    cost: Estimate


@dataclass(frozen=True)
class GapReport(Result):
    """The gain from being shown what follows: over all gaps, by their length, and in how played passages join.

    joins: empty if no piece is long enough; joined: gaps into which passages were put, of `seconds`
    """

    everything: LengthGain
    by_length: list[LengthGain]
    joins: list[JoinedKind]
    joined: int
    seconds: float


class MeasuredGap(NamedTuple):
    """A gap of piece number `piece`: its length, and notes and nats of the true passage."""

    piece: int
    seconds: float
    notes: int
    shown: float
    nothing: float


def measure_gaps(
    model: DSMR,
    corpus: Corpus,
    split: str = "validation",
    *,
    batch_size: int = 8,
    max_tokens: int | None = None,
    joins: int = JOINS,
    progress: Progress | None = None,
) -> GapReport:
    """Measure the gain from being shown what follows, on a split or a fixed sample of about `max_tokens` tokens.

    joins: the most gaps, one for each piece, into which passages are put. `progress(done, total)` counts tokens of the
    first part. Raises `UserError` if the model does not support gaps, if no piece is long enough for one, and as
    `losses.evaluate` does.
    """
    check_gaps(model, corpus.tokenizer)
    check_vocabulary(model, corpus)
    pieces = sample_pieces(corpus.pieces(split), max_tokens)
    ids = [corpus.tokens(piece) for piece in pieces]
    found = losses_in_gaps(model, corpus.tokenizer, ids, batch_size, progress)
    if not found:
        raise UserError(f"{corpus.path}: no {split} piece is long enough for a gap of {LENGTHS[0]} seconds")
    works = [piece.work for piece in pieces]
    rows = [
        summarize_gaps([gap for gap in found if low <= gap.seconds < high], works, low, high)
        for low, high in pairwise(LENGTHS)
    ]
    kinds, joined = measure_joins(model, corpus, pieces, joins)
    everything = summarize_gaps(found, works, LENGTHS[0], LENGTHS[-1])
    return GapReport(everything, [row for row in rows if row.notes], kinds, joined, JOIN_SECONDS)


def check_gaps(model: DSMR, tokenizer: Tokenizer) -> None:
    """Raise `UserError` if a model cannot be shown what follows a gap."""
    if reason := why_no_gaps(model, tokenizer):
        raise UserError(f"`gaps`: not with this model: {reason}")


def losses_in_gaps(
    model: DSMR, tokenizer: Tokenizer, ids: Sequence[np.ndarray], batch_size: int = 8, progress: Progress | None = None
) -> list[MeasuredGap]:
    """Return the losses of the true passages of some gaps in each piece `ids`, with what follows shown and without."""
    drawn = [
        (i, gaps)
        for epoch in range(ROUNDS)
        for i, piece in enumerate(ids)
        if (gaps := draw_gaps(tokenizer, piece, 1.0, 0, epoch, i))
    ]
    if not drawn:
        return []
    shown = [show_gaps(tokenizer, ids[i], with_lead(tokenizer.to_events(ids[i]), gaps)) for i, gaps in drawn]
    plain = [tokenizer.without_shown(piece) for piece in shown]  # subwords are divided at the gaps, too
    first = sum(len(piece) - 1 for piece in shown)
    total = first + sum(len(piece) - 1 for piece in plain)
    with_future = piece_losses(model, shown, batch_size, offset_progress(progress, 0, total))
    without = piece_losses(model, plain, batch_size, offset_progress(progress, first, total))
    found = []
    for (i, gaps), piece, seen, unseen in zip(drawn, shown, with_future, without, strict=True):
        mask = tokenizer.shown_mask(piece)
        # Without what is shown, the losses of the same tokens as in `unseen`.
        found += _passages(tokenizer, i, gaps, piece[~mask], seen[~mask[1:]], unseen)
    return found


def _passages(
    tokenizer: Tokenizer, number: int, gaps: Sequence[Gap], ids: np.ndarray, seen: np.ndarray, unseen: np.ndarray
) -> list[MeasuredGap]:
    """Return the gaps of a piece `ids` `(T,)`; seen, unseen: the losses `(T − 1,)` of its ids after the first.

    With subwords a passage begins with the first id that begins in it.
    """
    g = tokenizer.event_grammar()
    rows = [tokenizer.to_events(np.array([token])) for token in ids.tolist()]
    notes = np.array([np.count_nonzero(g.press[row] >= 0) for row in rows])
    ticks = np.cumsum([g.ticks[row].sum() for row in rows])
    lengths = np.array([len(row) for row in rows])
    elapsed = g.elapsed(np.concatenate(rows))
    found = []
    for gap in gaps:
        begin = int(np.searchsorted(np.cumsum(lengths) - lengths, gap.place))
        end = int(np.searchsorted(ticks, elapsed[gap.place - 1] + gap.ticks))
        inside = slice(begin - 1, end - 1)  # loss t is that of id t + 1
        count, seconds = int(notes[begin:end].sum()), gap.ticks * g.seconds_per_tick
        if end > begin:  # a rest costs nats, too
            sums = (float(losses[inside].sum(dtype=np.float64)) for losses in (seen, unseen))
            found.append(MeasuredGap(number, seconds, count, *sums))
    return found


def summarize_gaps(gaps: Sequence[MeasuredGap], works: Sequence[Hashable], start: float, end: float) -> LengthGain:
    """Summarize gaps of [start, end) seconds; works: of all pieces."""
    notes, shown, nothing = (
        np.array([getattr(gap, name) for gap in gaps], float) for name in ("notes", "shown", "nothing")
    )
    of_gap = [works[gap.piece] for gap in gaps]
    estimates = [estimate(nats, notes, of_gap) for nats in (shown, nothing, nothing - shown)]
    return LengthGain(start, end, len({gap.piece for gap in gaps}), len(gaps), int(notes.sum()), *estimates)


def measure_joins(
    model: DSMR, corpus: Corpus, pieces: Sequence[Piece], joins: int = JOINS
) -> tuple[list[JoinedKind], int]:
    """Return how passages of each kind join, and the number of gaps, one for each piece that is long enough."""
    rng, scores, works = np.random.default_rng(0), [], []
    chosen = [pieces[i] for i in rng.permutation(len(pieces))[: 4 * joins]]
    music = [(piece.work, corpus.tokenizer.decode(corpus.tokens(piece))) for piece in chosen]
    music = [(work, notes) for work, notes in music if notes.duration > 3 * JOIN_SECONDS][: max(joins, 2)]
    for i, (work, notes) in enumerate(music[:joins] if len(music) > 1 else ()):
        if (gap := _choose_gap(notes, rng)) is not None:
            other = _window(music[(i + 1) % len(music)][1], rng).shifted(gap.gaps[0][0])
            scores.append(_join(model, corpus.tokenizer, notes, gap, other, seed=i))
            works.append(work)
    if not scores:
        return [], 0
    nats, counts = np.array(scores).transpose(3, 1, 2, 0)  # (K, 2, P): kinds, passage and what follows, pieces
    true = list(KINDS).index("true")
    kinds = [
        JoinedKind(
            kind,
            estimate(nats[k, 0], counts[k, 0], works),
            estimate(nats[k, 1], counts[k, 1], works),
            estimate(nats[k, 1] - nats[true, 1], counts[k, 1], works),
        )
        for k, kind in enumerate(KINDS)
    ]
    return kinds, len(scores)


def _choose_gap(notes: Notes, rng: np.random.Generator) -> GappedMusic | None:
    """Take a passage out of the middle of a piece; None if there are no notes in it or after it."""
    start = round(float(rng.uniform(JOIN_SECONDS, notes.duration - 2 * JOIN_SECONDS)), 2)  # on the grid of 10 ms
    inside = (notes.onset >= start) & (notes.onset < start + JOIN_SECONDS)
    music = replaced(notes, [(start, start + JOIN_SECONDS)])
    return music if inside.any() and len(music.after) and len(music.before) else None


def _window(notes: Notes, rng: np.random.Generator) -> Notes:
    """A passage of a piece, from 0 s on."""
    start = float(rng.choice(notes.onset[notes.onset <= max(notes.duration - JOIN_SECONDS, 0)]))
    inside = notes.take((notes.onset >= start) & (notes.onset < start + JOIN_SECONDS))
    return inside.shifted(-start)


def _join(
    model: DSMR, tokenizer: Tokenizer, notes: Notes, music: GappedMusic, foreign: Notes, seed: int
) -> list[list[tuple[float, float]]]:
    """Put passages of all kinds into a gap. Return (nats, notes) of each passage and of what follows it."""
    reader, (start, end) = Reader(Player(model, tokenizer, seed=seed)), music.gaps[0]
    before = reader.read_to(music)

    def play(foresees: bool) -> Notes:
        gap = GapPlayer(tokenizer, music, before, foresees=foresees)
        gap.play(reader)
        return gap.notes(0)

    true = notes.take((notes.onset >= start) & (notes.onset < end))
    rows = []
    for passage in (true, play(True), play(False), foreign):
        score = score_passage(reader.player.copy(), music, before, passage)
        rows.append([(part.nats, part.notes) for part in (score.passage, score.following)])
    return rows
