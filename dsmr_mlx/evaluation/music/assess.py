"""`assess`: metrics and warnings for generated music, alone and compared with real music."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dsmr_mlx.common.formatting import format_time
from dsmr_mlx.data.corpus import Skipped, token_hash
from dsmr_mlx.evaluation.losses import Progress
from dsmr_mlx.evaluation.music.copies import SharedWithTraining, read_training, shared_with_training
from dsmr_mlx.evaluation.music.discriminator import FOLDS, Discrimination, tell_apart
from dsmr_mlx.evaluation.music.distances import FeatureComparison, FeatureSet, compare_sets
from dsmr_mlx.evaluation.music.features import Features, features_of
from dsmr_mlx.evaluation.music.sets import Music, Reference, read_files, read_reference, reference_tokenizer
from dsmr_mlx.evaluation.music.syntax import syntax_errors
from dsmr_mlx.music.loops import LOOPING_COPIES, Loop, worst_loop
from dsmr_mlx.music.summary import longest_silence, pitch_name, summarize
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.performance import performance_grammar

MAX_SILENCE = 3.0  # seconds
MAX_NOTE = 30.0  # seconds: 25 of the 976 performances in ASAP have a longer note
MIN_KEY, MAX_KEY = 21, 108  # MIDI pitches of a piano
MAX_LOOP_EVENTS = 256  # events of a loop: some bars of dense music
MAX_LOOP_RATIO = 0.3  # two-minute excerpts of the 976 performances in ASAP have at most 0.19
MIN_OVERLAP = 0.8
MIN_PIECES = 10  # with fewer, distances between pieces are unreliable


@dataclass(frozen=True)
class FileReport:
    """Figures of one file. Times in seconds.

    notes, seconds, lowest, highest, mean_polyphony, max_polyphony, longest_silence: as in `summary.Summary`;
    silence_at, longest_note_at, loop_at: when they begin. loop: the cycle of at most `MAX_LOOP_EVENTS` events, timing
    and velocities included, that is repeated most often in a row. outside_piano: notes outside the range of a piano.
    syntax_errors: number in a file of ids, None for MIDI files and if the grammar is unknown; first_error: the first
    one, or "". same_as: an earlier file with the same music. figures: by key, see `features.FIGURES`; None if the music
    is too short for it.
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
        """Whether a cycle is repeated at least `LOOPING_COPIES` times in a row."""
        return self.loop is not None and self.loop.copies >= LOOPING_COPIES

    @property
    def warnings(self) -> list[str]:
        """The problems of the file, one sentence each."""
        found = []
        if self.longest_silence > MAX_SILENCE:
            found.append(f"{self.longest_silence:.1f} s of silence from {format_time(self.silence_at)} on")
        if self.loop is not None and self.loops:
            times = f"{self.loop.copies} times in a row from {format_time(self.loop_at)} on"
            found.append(f"{self.loop.length} events {times}")
        elif (ratio := self.figures["loop_ratio"] or 0.0) > MAX_LOOP_RATIO:
            found.append(f"{ratio:.0%} of the notes are in loops of pitches")
        if self.longest_note > MAX_NOTE:
            found.append(f"a note of {self.longest_note:.0f} s at {format_time(self.longest_note_at)}")
        if self.outside_piano:
            notes = f"{self.outside_piano} note{'s' * (self.outside_piano > 1)}"
            found.append(f"{notes} outside the piano, {pitch_name(self.lowest)} to {pitch_name(self.highest)}")
        if self.syntax_errors:
            found.append(f"{self.syntax_errors} syntax error{'s' * (self.syntax_errors > 1)}, first {self.first_error}")
        if self.same_as is not None:
            found.append(f"the same music as {self.same_as}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"loops": self.loops, "warnings": self.warnings}


@dataclass(frozen=True, eq=False)
class Assessment:
    """The files, and their comparison with a reference and with training music.

    generated, real: features of the files and of the reference's excerpts; compared: one entry for each feature;
    discrimination: how well they can be told apart, None if there are too few; shared: runs shared with the training
    music. reference and real are None and compared is empty without a reference, shared is None without training music.
    """

    files: list[FileReport]
    skipped: list[Skipped]
    generated: FeatureSet
    reference: Reference | None
    real: FeatureSet | None
    compared: list[FeatureComparison]
    discrimination: Discrimination | None
    seed: int
    shared: SharedWithTraining | None

    @property
    def low(self) -> list[FeatureComparison]:
        """The distributions with an overlap below `MIN_OVERLAP`."""
        return [c for c in self.compared if c.overlap < MIN_OVERLAP]

    @property
    def remarks(self) -> list[str]:
        """Caveats about the figures, one sentence each."""
        if self.reference is None or self.real is None:
            return []
        found = []
        for what, n in (("generated", len(self.generated)), ("reference", len(self.real))):
            if n < MIN_PIECES:
                found.append(f"{n} {what}: OA and the KL of distances are unreliable below {MIN_PIECES}, see `real`")
        if self.reference.shorter:
            found.append(f"{self.reference.shorter} pieces of the reference are shorter than the files")
        if self.discrimination is None:
            found.append(f"no classifier: it needs {FOLDS} different files and excerpts of {FOLDS} works")
        if all(np.isnan(c.real_oa) for c in self.compared):
            found.append("the reference is too small to compare a part of it with the rest: no OA for `real`")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, and NaN for figures that do not exist."""
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
        discriminator = None if self.discrimination is None else self.discrimination.to_dict()
        return result | {
            "reference": reference,
            "features": features,
            "low_overlap": [c.key for c in self.low],
            "discriminator": discriminator,
            "remarks": self.remarks,
        }


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
    """Assess MIDI files, .npy files of ids, and folders of them, alone or compared with a reference.

    reference: a prepared corpus, of which `split` is used (default validation), or a folder of MIDI files; it is cut
    into excerpts as long as the files, see `sets.read_reference`. Ids are decoded by the tokenizer of the corpus, else
    as performance events. training: the training music of the model, see `copies.read_training`.
    `progress(done, total)` counts files, then excerpts, then readings of the training music.

    Raises `UserError` if no file can be used, and for an invalid reference or invalid training music.
    """
    tokenizer = reference_tokenizer(reference)
    trained_on = None if training is None else read_training(training, progress)
    music, skipped = read_files(paths, tokenizer, progress)
    features, contents = [features_of(m.notes) for m in music], [token_hash(m.ids) for m in music]
    known: dict[str, str] = {}
    files = []
    for m, f, content in zip(music, features, contents, strict=True):
        files.append(report_of(m, f, tokenizer, known.get(content)))
        known.setdefault(content, m.name)
    generated = FeatureSet(features, contents)  # equal files have one origin
    found, real, compared, discrimination = None, None, [], None
    if reference is not None:
        lengths = [m.notes.duration for m in music]
        found = read_reference(reference, lengths, split=split, excerpts=excerpts, seed=seed, progress=progress)
        real = FeatureSet([features_of(m.notes) for m in found.music], [m.origin for m in found.music])
        compared = compare_sets(generated, real, seed=seed)
        discrimination = tell_apart(generated, real, seed=seed)
    shared = trained_on and shared_with_training(music, found.music if found else [], trained_on, progress)
    return Assessment(files, skipped, generated, found, real, compared, discrimination, seed, shared)


def report_of(music: Music, features: Features, tokenizer: Tokenizer, same_as: str | None) -> FileReport:
    """Return the report on one file."""
    notes, grammar = music.notes, performance_grammar()
    summary, (_, silence_at) = summarize(notes), longest_silence(notes)
    length = notes.offset - notes.onset
    loop = worst_loop(music.ids, grammar.press, MAX_LOOP_EVENTS)
    errors = None if music.stored is None else syntax_errors(music.stored, tokenizer)
    return FileReport(
        name=music.name,
        **asdict(summary),
        notes_per_second=summary.notes_per_second,
        silence_at=silence_at,
        longest_note=float(length.max()),
        longest_note_at=float(notes.onset[length.argmax()]),
        loop=loop,
        loop_at=float(grammar.ticks[music.ids[: loop.start]].sum() * grammar.seconds_per_tick) if loop else 0.0,
        outside_piano=int(((notes.pitch < MIN_KEY) | (notes.pitch > MAX_KEY)).sum()),
        syntax_errors=errors[0] if errors else None,
        first_error=errors[1] if errors else "",
        same_as=same_as,
        figures={key: None if np.isnan(value) else value for key, value in features.figures.items()},
    )
