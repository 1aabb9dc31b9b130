"""Checkpoints side by side: how well they predict, what they carry, and what that costs on this machine.

Each is measured on a corpus of its own vocabulary, and all on the same pieces. Tokens are not the same amount of music
in two vocabularies, so perplexity and the loss per token compare checkpoints of one vocabulary only. The losses per
note and per second of music compare all, the loss per event those whose vocabularies have the same base. What a
tokenizer leaves out, by rounding time or loudness, need not be predicted: that lowers every one of them. Where it
leaves out notes, a remark says how many.
"""

import gc
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from dsmr_mlx.data.corpus import Corpus, Piece
from dsmr_mlx.evaluation.corpora import choose_corpora, shared_pieces
from dsmr_mlx.evaluation.losses import Measured, piece_losses, stored_weights, summarize
from dsmr_mlx.model import horizons
from dsmr_mlx.model.checkpoint import describe, load, resolve
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.horizons import HorizonSchedule
from dsmr_mlx.tokenizers.base import Tokenizer

QUALITY = ("nats_per_second", "nats_per_note", "nats_per_event", "nats_per_token", "perplexity")
LONG_NAME = 28  # characters: a folder that longer names share is told once
PER_EVENT, PER_TOKEN = ("nats_per_event",), ("nats_per_token", "perplexity")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's label, how many ids it has, its fingerprint, and that of the vocabulary of its events."""

    label: str
    size: int
    fingerprint: str
    events: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Vocabulary":
        base = getattr(tokenizer, "base", tokenizer)  # subwords stand for events of another vocabulary
        return cls(tokenizer.label, tokenizer.vocab_size, tokenizer.fingerprint, base.fingerprint)


@dataclass(frozen=True)
class Row:
    """A checkpoint among others.

    measured: its weights and losses; data: the corpus that it was measured on; state_bytes: the recurrent-state budget
    of one lane in bytes, 2 · Σ M_l · H_kv · D · itemsize, at the type of the weights; wall_seconds: of the evaluation,
    once the model was loaded and had run; peak_memory: in bytes, of weights, state and what evaluating takes.
    """

    measured: Measured
    data: str
    vocabulary: Vocabulary
    schedule: HorizonSchedule
    state_bytes: int
    wall_seconds: float
    peak_memory: int

    @property
    def name(self) -> str:
        """The checkpoint as it was named."""
        return self.measured.checkpoint

    @property
    def tokens_per_second(self) -> float:
        """Tokens predicted in a second."""
        return self.measured.evaluation.tokens / self.wall_seconds

    @property
    def events_per_second(self) -> float:
        """Events predicted in a second."""
        return self.measured.evaluation.events / self.wall_seconds

    @property
    def music_per_second(self) -> float:
        """Seconds of music predicted in a second: a speed that compares vocabularies."""
        return self.measured.evaluation.seconds / self.wall_seconds

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the figures of the evaluation stand beside the others."""
        v = self.vocabulary
        tokenizer = {"label": v.label, "vocab_size": v.size, "fingerprint": v.fingerprint, "events": v.events}
        state = {"horizons": list(self.schedule.horizons), "budget": self.schedule.budget, "bytes": self.state_bytes}
        rates = ("tokens_per_second", "events_per_second", "music_per_second")
        cost = {"wall_seconds": self.wall_seconds, **{name: getattr(self, name) for name in rates}}
        cost["peak_memory"] = self.peak_memory
        return {"data": self.data, "tokenizer": tokenizer, "state": state, "cost": cost, **self.measured.to_dict()}


@dataclass(frozen=True)
class Change:
    """What a checkpoint has more than the first one, in %: perplexity is None for another vocabulary."""

    bytes_percent: float
    nats_per_second_percent: float
    perplexity_percent: float | None


@dataclass(frozen=True)
class Comparison:
    """Checkpoints in the order in which they were given, all on the same `pieces` of a split.

    notes, seconds: of the pieces, as the first checkpoint's corpus counts them, for all rows; batch_size: pieces that
    were read side by side; remarks: what to know of the corpora.
    """

    rows: list[Row]
    split: str
    pieces: int
    notes: int
    seconds: float
    batch_size: int
    remarks: list[str]

    @property
    def folder(self) -> str:
        """The folder that all checkpoints lie in, where their names are long; else an empty text."""
        paths = [Path(row.name) for row in self.rows]
        if all(len(row.name) <= LONG_NAME for row in self.rows) or len({path.is_absolute() for path in paths}) > 1:
            return ""
        return os.path.commonpath([path.parent for path in paths]).removeprefix(".")

    @property
    def labels(self) -> list[str]:
        """The names of the checkpoints, as seen from `folder`."""
        return [str(Path(row.name).relative_to(self.folder)) if self.folder else row.name for row in self.rows]

    @property
    def tokenizers(self) -> list[str]:
        """The labels of the tokenizers, with the beginning of the fingerprint where two of one label differ."""
        vocabularies = [row.vocabulary for row in self.rows]
        counts = Counter(label for label, _ in {(v.label, v.fingerprint) for v in vocabularies})
        return [f"{v.label} {v.fingerprint[:8]}" if counts[v.label] > 1 else v.label for v in vocabularies]

    @property
    def comparable(self) -> tuple[str, ...]:
        """Those of `QUALITY` that mean the same for all rows."""
        one_vocabulary = len({row.vocabulary.fingerprint for row in self.rows}) == 1
        same_events = len({row.vocabulary.events for row in self.rows}) == 1
        left_out = () if one_vocabulary else PER_TOKEN if same_events else PER_EVENT + PER_TOKEN
        return tuple(name for name in QUALITY if name not in left_out)

    def best(self, name: str) -> list[int]:
        """The rows with the lowest value of one of `QUALITY`; none where it is not comparable, or equal for all."""
        values = [getattr(row.measured.evaluation, name) for row in self.rows]
        finite = [value for value in values if math.isfinite(value)]
        if name not in self.comparable or len(set(values)) < 2 or not finite:
            return []
        return [i for i, value in enumerate(values) if value == min(finite)]

    def change(self, row: Row) -> Change:
        """How a row differs from the first one."""
        first, one_vocabulary = self.rows[0], row.vocabulary.fingerprint == self.rows[0].vocabulary.fingerprint
        mine, other = row.measured.evaluation, first.measured.evaluation
        return Change(
            percent(row.measured.weights.bytes, first.measured.weights.bytes),
            percent(mine.nats_per_second, other.nats_per_second),
            percent(mine.perplexity, other.perplexity) if one_vocabulary else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values: what all have in common, and for each checkpoint its own."""
        common = {
            name: getattr(self, name) for name in ("split", "pieces", "notes", "seconds", "batch_size", "remarks")
        }
        rows = [row.to_dict() | {"change": asdict(self.change(row))} for row in self.rows]
        return common | {"comparable": list(self.comparable), "checkpoints": rows}


def percent(value: float, reference: float) -> float:
    """How much larger a value is than a reference, in %; NaN where the reference is 0."""
    return 100 * (value / reference - 1) if reference else math.nan


def compare(
    checkpoints: Sequence[str | Path],
    data: Sequence[str | Path] = (),
    split: str = "validation",
    *,
    batch_size: int = 8,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Measure checkpoints, or the best ones of runs, one after the other on the same pieces.

    data: corpora, one for each vocabulary; without them each run's own. Durations and numbers of notes are those of the
    first checkpoint's corpus, so that what is per second and per note has one denominator for all. With `max_tokens` a
    fixed sample of pieces, the same for all, of about so many tokens in the vocabulary that needs most.
    `progress(done, total)` is called with numbers of tokens, of all checkpoints together. Raises `UserError` before the
    first measurement for a checkpoint that is damaged, and as `choose_corpora` and `shared_pieces` do.
    """
    folders = [resolve(path).resolve() for path in checkpoints]
    tokenizers = [describe(folder)[1] for folder in folders]  # all, so that the last does not fail after the others
    names = [str(path) for path in checkpoints]
    corpora = choose_corpora(list(zip(names, folders, tokenizers, strict=True)), data)
    pieces = shared_pieces(corpora, split, max_tokens)
    counted = [_counted_as(first=pieces[0], own=own) for own in pieces]
    totals = [sum(piece.length - 1 for piece in own) for own in pieces]
    rows, befores = [], [sum(totals[:i]) for i in range(len(totals))]
    for name, folder, corpus, own, before in zip(names, folders, corpora, counted, befores, strict=True):
        report = partial(_report, progress, before, sum(totals)) if progress else None
        rows.append(measure(name, folder, corpus, own, batch_size, report))
    notes, seconds = sum(piece.notes for piece in pieces[0]), sum(piece.duration for piece in pieces[0])
    return Comparison(rows, split, len(pieces[0]), notes, seconds, batch_size, _remarks(corpora, pieces))


def measure(
    name: str,
    folder: Path,
    corpus: Corpus,
    pieces: Sequence[Piece],
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Row:
    """Load the checkpoint in a folder, let it predict some pieces of a corpus of its vocabulary, and let go of it."""
    gc.collect()
    before = mx.get_active_memory()
    model, tokenizer = load(folder, as_stored=True)
    ids = [np.array(corpus.tokens(piece)) for piece in pieces]
    _warm_up(model, ids, batch_size)
    mx.reset_peak_memory()
    start = time.perf_counter()
    losses = piece_losses(model, ids, batch_size, progress)
    seconds = time.perf_counter() - start
    peak = mx.get_peak_memory() - before
    c = model.config
    schedule = horizons.parse(f"custom:{','.join(map(str, c.horizons))}", c.n_layers)
    state_bytes = schedule.state_bytes(c.n_kv_heads, c.head_dim, itemsize=model.norm.weight.dtype.size)
    measured = Measured(name, stored_weights(model, folder), summarize(pieces, losses))
    return Row(measured, str(corpus.path), Vocabulary.of(tokenizer), schedule, state_bytes, seconds, peak)


def _warm_up(model: DSMR, ids: Sequence[np.ndarray], batch_size: int) -> None:
    """Two segments of the longest pieces, side by side as they will be: what is done once is not measured."""
    longest = sorted(ids, key=len)[-batch_size:]
    piece_losses(model, [piece[: 2 * model.config.segment_length + 1] for piece in longest], batch_size)


def _report(progress: Callable[[int, int], None], before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _counted_as(first: Sequence[Piece], own: Sequence[Piece]) -> list[Piece]:
    """Pieces of a corpus with the durations and numbers of notes that the first one has."""
    return [replace(p, duration=f.duration, notes=f.notes) for p, f in zip(own, first, strict=True)]


def _remarks(corpora: Sequence[Corpus], pieces: Sequence[Sequence[Piece]]) -> list[str]:
    """Where a corpus does not say all notes, and where they count other notes or durations in the same pieces."""
    remarks, first = [], pieces[0]
    for corpus, own in zip(corpora, pieces, strict=True):
        notes, said = sum(piece.notes for piece in own), sum(piece.notes_encoded for piece in own)
        late = sum(not piece.keeps_time for piece in own)
        if said < notes:
            remarks.append(
                f"{corpus.path} says {said:,} of {notes:,} notes ({corpus.tokenizer.label}): the others need not be "
                "predicted, which lowers the losses per note and per second"
            )
        if late:
            remarks.append(
                f"{corpus.path}: {late:,} of {len(own):,} pieces last longer or shorter by more than 1 s as "
                f"{corpus.tokenizer.label} says them"
            )
    for corpus, own in zip(corpora[1:], pieces[1:], strict=True):
        differ = sum(a.notes != b.notes or abs(a.duration - b.duration) > 0.01 for a, b in zip(first, own, strict=True))
        if differ:
            mine, other = (sum(piece.notes for piece in counted) for counted in (own, first))
            remarks.append(
                f"{corpus.path} counts {mine:,} notes, {corpora[0].path} {other:,}, and {differ} of {len(own)} pieces "
                "differ in notes or length: it is not quite the same music"
            )
    return list(dict.fromkeys(remarks))
