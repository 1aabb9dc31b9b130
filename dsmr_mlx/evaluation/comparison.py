"""Checkpoints side by side: their losses, the size of their state, and their cost on this machine.

Each checkpoint is evaluated on a corpus of its own vocabulary, all on the same pieces. A token is not the same amount
of music in two vocabularies, so perplexity and the loss per token compare checkpoints of one vocabulary only. The
losses per note and per second compare all checkpoints, the loss per event those with the same base vocabulary. What a
tokenizer rounds off or leaves out is not predicted, which lowers the losses; a remark counts the notes left out.
"""

import gc
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from dsmr_mlx.data.corpus import Corpus, Piece
from dsmr_mlx.evaluation.corpora import choose_corpora, leak_remark, shared_pieces
from dsmr_mlx.evaluation.losses import (
    EvaluatedCheckpoint,
    Progress,
    offset_progress,
    piece_losses,
    summarize,
    weight_info,
)
from dsmr_mlx.model.base import BASE, find_base
from dsmr_mlx.model.checkpoint import load, load_config_and_tokenizer, resolve
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.horizons import HorizonSchedule
from dsmr_mlx.tokenizers.base import Tokenizer

METRICS = ("nats_per_second", "nats_per_note", "nats_per_event", "nats_per_token", "perplexity")
MAX_NAME = 28  # characters: the common folder of longer names is shown once
PER_EVENT, PER_TOKEN = ("nats_per_event",), ("nats_per_token", "perplexity")


@dataclass(frozen=True)
class TokenizerInfo:
    """A tokenizer's label, number of ids, fingerprint, and the fingerprint of its base (without subwords: itself)."""

    label: str
    vocab_size: int
    fingerprint: str
    base_fingerprint: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "TokenizerInfo":
        """Describe a tokenizer."""
        base = getattr(tokenizer, "base", tokenizer)
        return cls(tokenizer.label, tokenizer.vocab_size, tokenizer.fingerprint, base.fingerprint)


@dataclass(frozen=True)
class ComparisonRow:
    """One checkpoint of a comparison.

    measured: its weights and losses; data: path of the corpus it was evaluated on; state_bytes: the recurrent-state
    budget of one lane in bytes, 2 · Σ M_l · H_kv · D · itemsize, in the dtype of the computation; wall_seconds:
    duration of the evaluation, loading and warm-up excluded; peak_memory: bytes of weights, state and temporaries.
    """

    measured: EvaluatedCheckpoint
    data: str
    tokenizer: TokenizerInfo
    schedule: HorizonSchedule
    state_bytes: int
    wall_seconds: float
    peak_memory: int

    @property
    def name(self) -> str:
        """The checkpoint's name as given by the user."""
        return self.measured.checkpoint

    @property
    def tokens_per_second(self) -> float:
        """Tokens evaluated per second."""
        return self.measured.evaluation.tokens / self.wall_seconds

    @property
    def events_per_second(self) -> float:
        """Events evaluated per second."""
        return self.measured.evaluation.events / self.wall_seconds

    @property
    def music_per_second(self) -> float:
        """Seconds of music evaluated per second: comparable across vocabularies."""
        return self.measured.evaluation.seconds / self.wall_seconds

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; those of the evaluation are not nested."""
        tokenizer = asdict(self.tokenizer)
        tokenizer["events"] = tokenizer.pop("base_fingerprint")
        state = {"horizons": list(self.schedule.horizons), "budget": self.schedule.budget, "bytes": self.state_bytes}
        rates = ("tokens_per_second", "events_per_second", "music_per_second")
        cost = {"wall_seconds": self.wall_seconds, **{name: getattr(self, name) for name in rates}}
        cost["peak_memory"] = self.peak_memory
        return {"data": self.data, "tokenizer": tokenizer, "state": state, "cost": cost, **self.measured.to_dict()}


@dataclass(frozen=True)
class Change:
    """Differences from the first checkpoint in %; perplexity is None if the vocabularies differ."""

    bytes_percent: float
    nats_per_second_percent: float
    perplexity_percent: float | None


@dataclass(frozen=True)
class Comparison:
    """Checkpoints in the order given, all evaluated on the same `pieces` (a count) of a split.

    notes, seconds: of these pieces in the first checkpoint's corpus, used for all rows; batch_size: pieces read side by
    side; remarks: caveats about the corpora, as sentences.
    """

    rows: list[ComparisonRow]
    split: str
    pieces: int
    notes: int
    seconds: float
    batch_size: int
    remarks: list[str]

    @property
    def folder(self) -> str:
        """The common parent folder of the checkpoints if a name is longer than `MAX_NAME`, else ""."""
        paths = [Path(row.name) for row in self.rows]
        if all(len(row.name) <= MAX_NAME for row in self.rows) or len({path.is_absolute() for path in paths}) > 1:
            return ""
        common = os.path.commonpath([path.parent for path in paths])
        return "" if common == "." else common

    @property
    def labels(self) -> list[str]:
        """The names of the checkpoints, relative to `folder`."""
        return [str(Path(row.name).relative_to(self.folder)) if self.folder else row.name for row in self.rows]

    @property
    def tokenizers(self) -> list[str]:
        """The labels of the tokenizers, with the start of the fingerprint if different ones share a label."""
        tokenizers = [row.tokenizer for row in self.rows]
        counts = Counter(label for label, _ in {(t.label, t.fingerprint) for t in tokenizers})
        return [f"{t.label} {t.fingerprint[:8]}" if counts[t.label] > 1 else t.label for t in tokenizers]

    @property
    def comparable(self) -> tuple[str, ...]:
        """The `METRICS` that can be compared across all rows."""
        one_vocabulary = len({row.tokenizer.fingerprint for row in self.rows}) == 1
        one_base = len({row.tokenizer.base_fingerprint for row in self.rows}) == 1
        excluded = () if one_vocabulary else PER_TOKEN if one_base else PER_EVENT + PER_TOKEN
        return tuple(name for name in METRICS if name not in excluded)

    def best(self, name: str) -> list[int]:
        """Return the indices of the rows with the lowest value of a metric; none if not comparable or all equal."""
        values = [getattr(row.measured.evaluation, name) for row in self.rows]
        finite = [value for value in values if math.isfinite(value)]
        if name not in self.comparable or len(set(values)) < 2 or not finite:
            return []
        return [i for i, value in enumerate(values) if value == min(finite)]

    def change(self, row: ComparisonRow) -> Change:
        """Return how a row differs from the first one."""
        first = self.rows[0]
        one_vocabulary = row.tokenizer.fingerprint == first.tokenizer.fingerprint
        mine, other = row.measured.evaluation, first.measured.evaluation
        return Change(
            percent(row.measured.weights.bytes, first.measured.weights.bytes),
            percent(mine.nats_per_second, other.nats_per_second),
            percent(mine.perplexity, other.perplexity) if one_vocabulary else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: those common to all rows, then the rows under "checkpoints"."""
        names = ("split", "pieces", "notes", "seconds", "batch_size", "remarks")
        common = {name: getattr(self, name) for name in names}
        rows = [row.to_dict() | {"change": asdict(self.change(row))} for row in self.rows]
        return common | {"comparable": list(self.comparable), "checkpoints": rows}


def percent(value: float, reference: float) -> float:
    """Return by how many % a value exceeds a reference; NaN if the reference is 0."""
    return 100 * (value / reference - 1) if reference else math.nan


def compare(
    checkpoints: Sequence[str | Path],
    data: Sequence[str | Path] = (),
    split: str = "validation",
    *,
    batch_size: int = 8,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Evaluate checkpoints, or the best checkpoints of runs, one after the other on the same pieces.

    data: corpora, one for each vocabulary; if empty, those that the runs were trained on. Durations and numbers of
    notes are those of the first checkpoint's corpus, so that losses per second and per note have one denominator.
    max_tokens: evaluate a fixed sample of pieces, the same for all, see `shared_pieces`. `progress(done, total)` counts
    the tokens of all checkpoints. Raises `UserError` before the first evaluation if a checkpoint is damaged, and as
    `choose_corpora` and `shared_pieces` do.
    """
    folders = [resolve(path).resolve() for path in checkpoints]
    tokenizers = [load_config_and_tokenizer(folder)[1] for folder in folders]  # checks all before the first evaluation
    for folder in folders:
        if (folder / BASE).is_file():
            find_base(folder)
    names = [str(path) for path in checkpoints]
    corpora = choose_corpora(list(zip(names, folders, tokenizers, strict=True)), data)
    pieces = shared_pieces(corpora, split, max_tokens)
    total = sum(piece.length - 1 for own in pieces for piece in own)
    rows, done, remarks = [], 0, _remarks(corpora, pieces)
    for name, folder, corpus, own in zip(names, folders, corpora, pieces, strict=True):
        counted = _counted_as(first=pieces[0], own=own)
        rows.append(measure(name, folder, corpus, counted, batch_size, offset_progress(progress, done, total)))
        done += rows[-1].measured.evaluation.tokens
        remarks += leak_remark(name, folder, corpus, own)
    notes, seconds = sum(piece.notes for piece in pieces[0]), sum(piece.duration for piece in pieces[0])
    return Comparison(rows, split, len(pieces[0]), notes, seconds, batch_size, remarks)


def measure(
    name: str, folder: Path, corpus: Corpus, pieces: Sequence[Piece], batch_size: int, progress: Progress | None = None
) -> ComparisonRow:
    """Load the checkpoint in a folder, evaluate it on pieces of a corpus of its vocabulary, and release it."""
    gc.collect()
    before = mx.get_active_memory()
    model, tokenizer = load(folder)
    ids = [np.array(corpus.tokens(piece)) for piece in pieces]
    _warm_up(model, ids, batch_size)
    mx.reset_peak_memory()
    start = time.perf_counter()
    losses = piece_losses(model, ids, batch_size, progress)
    seconds = time.perf_counter() - start
    peak = mx.get_peak_memory() - before
    c = model.config
    schedule = HorizonSchedule.custom(c.horizons)
    itemsize = model.norm.weight.dtype.size
    state_bytes = schedule.state_bytes(c.n_kv_heads, c.head_dim, itemsize=itemsize, canon_size=c.canon_size)
    measured = EvaluatedCheckpoint(name, weight_info(model, folder), summarize(corpus, pieces, losses))
    return ComparisonRow(measured, str(corpus.path), TokenizerInfo.of(tokenizer), schedule, state_bytes, seconds, peak)


def _warm_up(model: DSMR, ids: Sequence[np.ndarray], batch_size: int) -> None:
    """Evaluate two segments of the longest pieces in a full batch, so that one-time work is not timed."""
    longest = sorted(ids, key=len)[-batch_size:]
    piece_losses(model, [piece[: 2 * model.config.segment_length + 1] for piece in longest], batch_size)


def _counted_as(first: Sequence[Piece], own: Sequence[Piece]) -> list[Piece]:
    """Return the pieces of one corpus with the durations and numbers of notes of the first corpus."""
    return [replace(p, duration=f.duration, notes=f.notes) for p, f in zip(own, first, strict=True)]


def _remarks(corpora: Sequence[Corpus], pieces: Sequence[Sequence[Piece]]) -> list[str]:
    """Return remarks on corpora that do not encode all notes or durations, or that disagree about their numbers."""
    remarks, first = [], pieces[0]
    for corpus, own in zip(corpora, pieces, strict=True):
        notes, encoded = sum(piece.notes for piece in own), sum(piece.notes_encoded for piece in own)
        late = sum(not piece.keeps_time for piece in own)
        if encoded < notes:
            remarks.append(
                f"{corpus.path} encodes {encoded:,} of {notes:,} notes ({corpus.tokenizer.label}): the others are not "
                "predicted, which lowers the losses per note and per second"
            )
        if late:
            remarks.append(
                f"{corpus.path}: encoded by {corpus.tokenizer.label}, {late:,} of {len(own):,} pieces are longer or "
                "shorter by more than 1 s"
            )
    for corpus, own in zip(corpora[1:], pieces[1:], strict=True):
        differ = sum(a.notes != b.notes or abs(a.duration - b.duration) > 0.01 for a, b in zip(first, own, strict=True))
        if differ:
            mine, other = (sum(piece.notes for piece in counted) for counted in (own, first))
            remarks.append(
                f"{corpus.path} has {mine:,} notes, {corpora[0].path} {other:,}; {differ} of {len(own)} pieces differ "
                "in notes or length: the music is not exactly the same"
            )
    return list(dict.fromkeys(remarks))
