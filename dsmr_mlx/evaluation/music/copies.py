"""Copies of training music: the longest run of events that each file shares with a training piece.

All music shares scales, trills and silences, so the figure is compared with that of an equal amount of real music that
the model was not trained on.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus, Skipped
from dsmr_mlx.evaluation.losses import Progress
from dsmr_mlx.evaluation.music.distances import SETS
from dsmr_mlx.evaluation.music.sets import Music, find_pieces, is_corpus
from dsmr_mlx.evaluation.music.shared_runs import READINGS, SharedWindow, Strings, longest_runs, strings_of
from dsmr_mlx.tokenizers import performance
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer

GRAMMAR = performance.performance_grammar()


@dataclass(frozen=True, eq=False)
class TrainingMusic:
    """Pieces that a model was trained on.

    names, ids: of each piece, the ids `(T,)` being its canonical performance events without specials; kind: a
    description of the pieces; skipped: unusable files.
    """

    names: list[str]
    ids: list[np.ndarray]
    kind: str
    skipped: list[Skipped]

    @property
    def events(self) -> int:
        """Number of events of all pieces."""
        return sum(map(len, self.ids))


@dataclass(frozen=True)
class SharedRun:
    """The longest run that a file shares with any training piece. Times in seconds.

    length: in events, or in notes in the reading "notes"; seconds: its duration in the file; at: its start in the file;
    pitches: how many distinct pitches it presses, few in a trill; piece, piece_at: the first training piece that has
    it, and its start there; semitones: by how much the file is higher. If nothing is shared, `length` is 0 and `piece`
    None.
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
class SharedRuns:
    """The longest runs in one of the `READINGS`: of each file, and of as many excerpts of the reference."""

    reading: str
    generated: list[SharedRun]
    reference: list[SharedRun]

    @property
    def title(self) -> str:
        """The reading in words."""
        return READINGS[self.reading]

    @property
    def summaries(self) -> dict[str, dict[str, float | None]]:
        """The `length_summary` of each set that has runs.

        `longest` is None for a reference of fewer excerpts than files: the longest of more is longer.
        """
        found = {name: length_summary(runs) for name in SETS if (runs := getattr(self, name))}
        if 0 < len(self.reference) < len(self.generated):
            found["reference"]["longest"] = None
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        summaries = {f"{name}_summary": summary for name, summary in self.summaries.items()}
        runs = {name: [asdict(run) for run in getattr(self, name)] for name in SETS}
        return {"reading": self.reading, **summaries, **runs}


@dataclass(frozen=True)
class SharedWithTraining:
    """The runs shared with training music in each reading.

    kind, pieces, events, skipped: of the training music, see `TrainingMusic`; pieces and events are counts.
    """

    kind: str
    pieces: int
    events: int
    readings: list[SharedRuns]
    skipped: list[Skipped]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        readings = [shared.to_dict() for shared in self.readings]
        counts = {"kind": self.kind, "pieces": self.pieces, "events": self.events}
        return counts | {"readings": readings, "skipped": [asdict(skipped) for skipped in self.skipped]}


def length_summary(runs: Sequence[SharedRun]) -> dict[str, float | None]:
    """Return the number of runs, and the median and maximum of their lengths."""
    lengths = [run.length for run in runs]
    return {"files": len(lengths), "median": float(np.median(lengths)), "longest": max(lengths)}


def read_training(path: str | os.PathLike, progress: Progress | None = None) -> TrainingMusic:
    """Read the training split of a corpus, or all MIDI files in a folder.

    `progress(done, total)` counts pieces. Raises `UserError` if the path is neither, or if no piece can be used.
    """
    path = Path(path)
    sources, kind = find_pieces(path, "train" if is_corpus(path) else None, "training")
    corpus = Corpus.load(path) if is_corpus(path) else None
    names, ids, skipped = [], [], []
    if corpus is not None and isinstance(corpus.tokenizer, PerformanceTokenizer):
        pieces = corpus.pieces("train")
        names, tokens = [piece.source for piece in pieces], map(corpus.tokens, pieces)
        ids = [piece[piece >= performance.NOTE_ON] for piece in tokens]  # without PAD, BOS and EOS
    else:
        for i, source in enumerate(sources):
            try:
                ids.append(Music.of(source.name, source.read()).ids)
                names.append(source.name)
            except UserError as error:
                skipped.append(Skipped(source.name, str(error)))
            if progress:
                progress(i + 1, len(sources))
    if not any(map(len, ids)):
        raise UserError(f"`training` {path}: no notes in any of {len(sources)} {kind}")
    return TrainingMusic(names, ids, kind, skipped)


def shared_with_training(
    generated: Sequence[Music], reference: Sequence[Music], training: TrainingMusic, progress: Progress | None = None
) -> SharedWithTraining:
    """Find the longest runs that the files, and as many excerpts of the reference, share with training pieces.

    `progress(done, total)` counts the readings. Needs about 75 bytes for each event of the training pieces, and a
    minute for ten million of them.
    """
    music, found = [*generated, *reference[: len(generated)]], []
    for done, reading in enumerate(READINGS):
        if progress:
            progress(done, len(READINGS))
        mine = strings_of(reading, [m.ids for m in music])
        theirs = strings_of(reading, training.ids)
        pairs = zip(music, longest_runs(mine, theirs), strict=True)
        runs = [describe_run(m, run, mine, theirs, training) for m, run in pairs]
        found.append(SharedRuns(reading, runs[: len(generated)], runs[len(generated) :]))
    return SharedWithTraining(training.kind, len(training.ids), training.events, found, training.skipped)


def describe_run(music: Music, run: SharedWindow, mine: Strings, theirs: Strings, training: TrainingMusic) -> SharedRun:
    """Convert a run of symbols to times, pitches and a training piece."""
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
