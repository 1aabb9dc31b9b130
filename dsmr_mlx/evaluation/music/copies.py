"""Whether music repeats what a model was trained on: each file's longest run of events that is in a training piece.

A figure alone says nothing, for all music shares scales, trills and silences. So it stands beside the same figure of
real music that the model has not heard, as much of it and as long.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus, Skipped
from dsmr_mlx.evaluation.music.sets import Music, Progress, Source, is_corpus, reference_sources
from dsmr_mlx.evaluation.music.shared_runs import READINGS, Run, Strings, longest_runs, strings_of
from dsmr_mlx.tokenizers import performance
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer

GRAMMAR = performance.performance_grammar()


@dataclass(frozen=True, eq=False)
class Training:
    """Pieces that a model was trained on. ids: their canonical performance events, no specials; kind: what they are, in
    words; skipped: files that cannot be used."""

    names: list[str]
    ids: list[np.ndarray]
    kind: str
    skipped: list[Skipped]

    @property
    def events(self) -> int:
        return sum(map(len, self.ids))


@dataclass(frozen=True)
class SharedRun:
    """The longest run that a file shares with any training piece. Times in seconds.

    length: events, or notes where these are read alone; seconds: how long the run lasts in the file; at: where it
    begins there; pitches: how many different ones it strikes, few in a trill; piece, piece_at: where it is in the
    training pieces, the first one of several; semitones: by how much the file is higher. Of a file that shares nothing
    the length is 0 and the piece None.
    """

    name: str
    length: int
    seconds: float
    at: float
    pitches: int
    piece: str | None
    piece_at: float
    semitones: int


@dataclass(frozen=True)
class Shared:
    """The longest runs in one of the `READINGS`, file by file, and those of as many excerpts of the reference."""

    reading: str
    generated: list[SharedRun]
    reference: list[SharedRun]

    @property
    def title(self) -> str:
        return READINGS[self.reading]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        sets = {"generated": self.generated, "reference": self.reference}
        summary = {name: summarized(runs) for name, runs in sets.items() if runs}
        return {"reading": self.reading, **{f"{name}_summary": found for name, found in summary.items()}} | {
            name: [asdict(run) for run in runs] for name, runs in sets.items()
        }


@dataclass(frozen=True)
class SharedWithTraining:
    """What music has in common with training pieces: of how many, of how many events, in each reading."""

    kind: str
    pieces: int
    events: int
    readings: list[Shared]
    skipped: list[Skipped]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        readings = [shared.to_dict() for shared in self.readings]
        return {"kind": self.kind, "pieces": self.pieces, "events": self.events, "readings": readings}


def summarized(runs: Sequence[SharedRun]) -> dict[str, float]:
    """Median and maximum of the lengths."""
    lengths = [run.length for run in runs]
    return {"files": len(lengths), "median": float(np.median(lengths)), "longest": max(lengths)}


def read_training(path: str | os.PathLike, progress: Progress | None = None) -> Training:
    """The training split of a corpus, or all MIDI files in a folder.

    Raises UserError, which names --training, for what is neither, and where nothing can be used.
    """
    path = Path(path)
    sources, kind = reference_sources(path, "train" if is_corpus(path) else None, "--training")
    corpus = Corpus.load(path) if is_corpus(path) else None
    names, ids, skipped = [], [], []
    if corpus is not None and isinstance(corpus.tokenizer, PerformanceTokenizer):
        pieces = corpus.pieces("train")
        names, ids = [piece.source for piece in pieces], [events_of(corpus.tokens(piece)) for piece in pieces]
    else:
        for i, source in enumerate(sources):
            read_piece(source, names, ids, skipped)
            if progress:
                progress(i + 1, len(sources))
    if not any(map(len, ids)):
        raise UserError(f"--training {path}: no notes in any of {len(sources)} {kind}, expected music")
    return Training(names, ids, kind, skipped)


def events_of(ids: np.ndarray) -> np.ndarray:
    """The ids of a piece without PAD, BOS and EOS."""
    return ids[ids >= performance.NOTE_ON]


def read_piece(source: Source, names: list[str], ids: list[np.ndarray], skipped: list[Skipped]) -> None:
    try:
        music = Music.of(source.name, source.notes())
    except UserError as error:
        skipped.append(Skipped(source.name, str(error)))
        return
    names.append(music.name)
    ids.append(music.ids)


def shared_with_training(
    generated: Sequence[Music], reference: Sequence[Music], training: Training, progress: Progress | None = None
) -> SharedWithTraining:
    """The longest runs that files share with training pieces, and those of the first of the reference's excerpts, as
    many as there are files.

    `progress(done, total)` counts the readings. It takes about 75 bytes for each event of the training pieces, and a
    minute for ten million of them.
    """
    music, found = [*generated, *reference[: len(generated)]], []
    for done, reading in enumerate(READINGS):
        if progress:
            progress(done, len(READINGS))
        mine = strings_of(reading, [m.ids for m in music])
        theirs = strings_of(reading, training.ids)
        pairs = zip(music, longest_runs(mine, theirs), strict=True)
        runs = [described(m, i, run, mine, theirs, training) for i, (m, run) in enumerate(pairs)]
        found.append(Shared(reading, runs[: len(generated)], runs[len(generated) :]))
    return SharedWithTraining(training.kind, len(training.ids), training.events, found, training.skipped)


def described(music: Music, number: int, run: Run, mine: Strings, theirs: Strings, training: Training) -> SharedRun:
    """A run in words of music: what, when, and in which piece."""
    if not run.length:
        return SharedRun(music.name, 0, 0.0, 0.0, 0, None, 0.0, 0)
    at = mine.place[[run.at, run.at + run.length - 1]]
    piece = int(theirs.owner(np.array([run.there]))[0])
    clock = np.cumsum(GRAMMAR.ticks[music.ids]) * GRAMMAR.seconds_per_tick
    events = music.ids[at[0] : at[1] + 1]
    pitches = mine.pitch[run.at : run.at + run.length], theirs.pitch[run.there : run.there + run.length]
    known = pitches[0] >= 0
    return SharedRun(
        name=music.name,
        length=run.length,
        seconds=float(clock[at[1]] - clock[at[0]]),
        at=float(clock[at[0]]),
        pitches=len(np.unique(events[(events >= performance.NOTE_ON) & (events < performance.NOTE_OFF)])),
        piece=training.names[piece],
        piece_at=float(
            GRAMMAR.ticks[training.ids[piece][: theirs.place[run.there] + 1]].sum() * GRAMMAR.seconds_per_tick
        ),
        semitones=int(pitches[0][known][0] - pitches[1][known][0]) if known.any() else 0,
    )
