"""`assess`: what is to be said of some music, by itself and beside real music."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dsmr_mlx.common.formatting import clock
from dsmr_mlx.data.corpus import Skipped, token_hash
from dsmr_mlx.evaluation.music.copies import SharedWithTraining, read_training, shared_with_training
from dsmr_mlx.evaluation.music.distances import Compared, FeatureSet, compare
from dsmr_mlx.evaluation.music.features import Features, features_of
from dsmr_mlx.evaluation.music.sets import Music, Progress, Reference, read_files, read_reference, tokenizer_of
from dsmr_mlx.evaluation.music.syntax import syntax_errors
from dsmr_mlx.music.loops import LOOPING_COPIES, Loop, worst_loop
from dsmr_mlx.music.summary import longest_silence, pitch_name, summarize
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.performance import performance_grammar

DEAD_AIR = 3.0  # seconds of silence that are remarked upon
STUCK = 30.0  # seconds of a note: 25 of the 976 performances in ASAP have a longer one
LOWEST_KEY, HIGHEST_KEY = 21, 108  # of a piano
LONGEST_CYCLE = 256  # events, that a loop is looked for among: some bars of dense music
LOOPED = 0.3  # loop ratio: of 976 excerpts of two minutes, one of each performance in ASAP, none has more than 0.19
GOOD_OVERLAP = 0.8
FEW = 10  # pieces, below which distances between them say little


@dataclass(frozen=True)
class FileReport:
    """One file. Times in seconds.

    notes, seconds, lowest, highest, mean_polyphony, max_polyphony, longest_silence: as in `pianoroll.Summary`;
    silence_at, longest_note_at, loop_at: when they begin. loop: the exact cycle of at most 256 events, with their
    timing and velocities, that comes most often in a row. outside_piano: notes that a piano has no key for.
    syntax_errors: of a file of ids, None for MIDI files, which have no syntax to break, and where no grammar is
    known; first_error: which. same_as: an earlier file with the same music. figures: by name, see
    `features.FIGURES`; None for what the music is too short for.
    """

    name: str
    notes: int
    seconds: float
    notes_per_second: float
    lowest: int
    highest: int
    mean_polyphony: float
    max_polyphony: int
    longest_silence: float
    silence_at: float
    longest_note: float
    longest_note_at: float
    loop: Loop | None
    loop_at: float
    outside_piano: int
    syntax_errors: int | None
    first_error: str
    same_as: str | None
    figures: dict[str, float | None]

    @property
    def loops(self) -> bool:
        """Whether a cycle comes too often in a row for music."""
        return self.loop is not None and self.loop.copies >= LOOPING_COPIES

    @property
    def warnings(self) -> list[str]:
        """What is wrong with it, in words."""
        found = []
        if self.longest_silence > DEAD_AIR:
            found.append(f"{self.longest_silence:.1f} s of silence from {clock(self.silence_at)} on")
        if self.loop is not None and self.loops:
            found.append(f"{self.loop.length} events {self.loop.copies} times in a row from {clock(self.loop_at)} on")
        elif (ratio := self.figures["loop_ratio"] or 0.0) > LOOPED:
            found.append(f"{ratio:.0%} of the notes are in loops of pitches")
        if self.longest_note > STUCK:
            found.append(f"a note of {self.longest_note:.0f} s at {clock(self.longest_note_at)}")
        if self.outside_piano:
            notes = f"{self.outside_piano} note{'s' * (self.outside_piano > 1)}"
            found.append(f"{notes} that a piano has not, {pitch_name(self.lowest)} to {pitch_name(self.highest)}")
        if self.syntax_errors:
            found.append(f"{self.syntax_errors} syntax error{'s' * (self.syntax_errors > 1)}, first {self.first_error}")
        if self.same_as is not None:
            found.append(f"the same music as {self.same_as}")
        return found

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"loops": self.loops, "warnings": self.warnings}


@dataclass(frozen=True, eq=False)
class Assessment:
    """What was found. compared, reference and real are empty or None where there was no reference, shared where no
    training music was given; remarks: how far the figures can be trusted."""

    files: list[FileReport]
    skipped: list[Skipped]
    generated: FeatureSet
    reference: Reference | None = None
    real: FeatureSet | None = None
    compared: list[Compared] = field(default_factory=list)
    seed: int = 0
    shared: SharedWithTraining | None = None

    @property
    def low(self) -> list[Compared]:
        """The distributions that overlap less than `GOOD_OVERLAP`."""
        return [c for c in self.compared if c.overlap < GOOD_OVERLAP]

    @property
    def remarks(self) -> list[str]:
        """How far the figures can be trusted."""
        if self.reference is None or self.real is None:
            return []
        found = []
        for what, n in (("generated", len(self.generated)), ("reference", len(self.real))):
            if n < FEW:
                found.append(f"{n} {what}: OA and the KL of distances say little below {FEW}, see `real`")
        if self.reference.shorter:
            found.append(
                f"{self.reference.shorter} pieces of the reference are shorter than what they are compared with"
            )
        if all(np.isnan(c.real_oa) for c in self.compared):
            found.append("the reference is too small to compare a part of it with the rest: no figures for `real`")
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON values but for NaN, which stands for what does not exist."""
        result: dict[str, Any] = {
            "files": [report.to_dict() for report in self.files],
            "skipped": [asdict(skipped) for skipped in self.skipped],
        }
        if self.shared is not None:
            result["training"] = self.shared.to_dict()
        if self.reference is None:
            return result
        reference = {
            "kind": self.reference.kind,
            "excerpts": len(self.reference.music),
            "seconds": sum(music.notes.duration for music in self.reference.music),
            "pieces": self.reference.pieces,
            "shorter": self.reference.shorter,
            "seed": self.seed,
            "skipped": [asdict(skipped) for skipped in self.reference.skipped],
        }
        features = [c.to_dict() for c in self.compared]
        low = [c.key for c in self.low]
        return result | {"reference": reference, "features": features, "low_overlap": low, "remarks": self.remarks}


def assess(
    paths: Sequence[str | os.PathLike],
    reference: str | os.PathLike | None = None,
    *,
    split: str | None = None,
    excerpts: int = 100,
    seed: int = 0,
    training: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> Assessment:
    """Assess MIDI files, .npy files of ids, and folders of them; beside a reference if there is one.

    reference: a prepared corpus, of which a split is taken (default validation), or a folder of MIDI files; it is cut
    into excerpts as long as the files, see `music.read_reference`. Ids are those of the corpus, else performance
    events. training: what the model was trained on, see `copies`. progress: called with (done, in all) while files are
    read, then while excerpts are, then while they are compared with the training music.

    Raises UserError when nothing can be used, and for a reference or training music that is none.
    """
    tokenizer = tokenizer_of(reference)
    trained_on = None if training is None else read_training(training, progress)
    music, skipped = read_files(paths, tokenizer, progress)
    features = [features_of(m.notes) for m in music]
    known: dict[str, str] = {}
    files = []
    for m, f in zip(music, features, strict=True):
        content = token_hash(m.ids)
        files.append(report_of(m, f, tokenizer, known.get(content)))
        known.setdefault(content, m.name)
    generated = FeatureSet(features, [m.origin for m in music])
    found, real, compared = None, None, []
    if reference is not None:
        lengths = [m.notes.duration for m in music]
        found = read_reference(reference, lengths, split=split, excerpts=excerpts, seed=seed, progress=progress)
        real = FeatureSet([features_of(m.notes) for m in found.music], [m.origin for m in found.music])
        compared = compare(generated, real, seed=seed)
    shared = trained_on and shared_with_training(music, found.music if found else [], trained_on, progress)
    return Assessment(files, skipped, generated, found, real, compared, seed, shared)


def report_of(music: Music, features: Features, tokenizer: Tokenizer, same_as: str | None) -> FileReport:
    """What is to be said of one file."""
    notes, grammar = music.notes, performance_grammar()
    summary, (_, silence_at) = summarize(notes), longest_silence(notes)
    length = notes.offset - notes.onset
    loop = worst_loop(music.ids, grammar.press, LONGEST_CYCLE)
    errors = None if music.stored is None else syntax_errors(music.stored, tokenizer)
    return FileReport(
        name=music.name,
        notes=len(notes),
        seconds=notes.duration,
        notes_per_second=summary.notes_per_second,
        lowest=int(notes.pitch.min()),
        highest=int(notes.pitch.max()),
        mean_polyphony=summary.mean_polyphony,
        max_polyphony=summary.max_polyphony,
        longest_silence=summary.longest_silence,
        silence_at=silence_at,
        longest_note=float(length.max()),
        longest_note_at=float(notes.onset[length.argmax()]),
        loop=loop,
        loop_at=float(grammar.ticks[music.ids[: loop.start]].sum() * grammar.seconds_per_tick) if loop else 0.0,
        outside_piano=int(((notes.pitch < LOWEST_KEY) | (notes.pitch > HIGHEST_KEY)).sum()),
        syntax_errors=errors[0] if errors else None,
        first_error=errors[1] if errors else "",
        same_as=same_as,
        figures={key: None if np.isnan(value) else value for key, value in features.figures.items()},
    )
