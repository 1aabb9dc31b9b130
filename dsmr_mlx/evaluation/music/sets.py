"""The music that is assessed: files of notes or ids, and excerpts of real music as long as they are.

Everything goes through the 10 ms grid of the performance events, so that a MIDI file, a stream of ids and a piece of
a corpus with the same notes have the same features.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import INDEX, Corpus, Skipped
from dsmr_mlx.data.midi_folder import SUFFIXES, find_files
from dsmr_mlx.music.midi import MUSIC, read_bytes, read_notes
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.summary import excerpt
from dsmr_mlx.tokenizers import performance
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer

IDS_SUFFIX = ".npy"  # what training writes where it has no MIDI library

Progress = Callable[[int, int], None]  # done, in all


@dataclass(frozen=True, eq=False)
class Music:
    """One file, or an excerpt.

    notes: on the grid, the first at 0 s; ids: their canonical performance events `[T]`, no specials; origin: the work
    that it is from; stored: the ids of the file itself, if it has ids.
    """

    name: str
    notes: Notes
    ids: np.ndarray
    origin: str = ""
    stored: np.ndarray | None = None

    @classmethod
    def of(cls, name: str, notes: Notes, origin: str = "", stored: np.ndarray | None = None) -> "Music":
        ids = performance.encode_notes(notes)
        return cls(name, performance.decode_ids(ids), ids, origin or name, stored)


@dataclass(frozen=True, eq=False)
class Reference:
    """Excerpts of real music. pieces: how many they are from; shorter: how many of these are shorter than what they are
    compared with; kind: what the pieces are, in words."""

    music: list[Music]
    pieces: int
    shorter: int
    kind: str
    skipped: list[Skipped] = field(default_factory=list)


def read_ids(path: Path) -> np.ndarray:
    """The ids `[T]` of a .npy file; UserError, without the path, for anything else."""
    try:
        ids = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"not a NumPy file of ids ({error})") from error
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.ndim != 1:
        found = f"{ids.ndim}-d {ids.dtype}" if isinstance(ids, np.ndarray) else "an archive"
        raise UserError(f"{found}, expected 1-d integers")
    return ids


def read_music(path: Path, name: str, tokenizer: Tokenizer) -> Music:
    """A MIDI file, or a .npy of ids; UserError, without the path, for what has no notes or cannot be read."""
    if path.suffix.lower() != IDS_SUFFIX:
        return Music.of(name, read_notes(read_bytes(path)))
    ids = read_ids(path)
    notes = tokenizer.decode(ids)
    if notes.duration > MUSIC.seconds:
        raise UserError(f"{notes.duration:.0f} s long, expected at most {MUSIC.seconds:.0f} s")
    music = Music.of(name, notes, stored=ids)
    if not len(music.notes):
        raise UserError("no notes but drums" if len(notes) else "no notes")
    return music


def read_files(
    paths: Sequence[str | os.PathLike], tokenizer: Tokenizer, progress: Progress | None = None
) -> tuple[list[Music], list[Skipped]]:
    """The MIDI files and .npy files of ids among paths and in folders, in order; and what cannot be used, and why.

    Raises UserError for a path that does not exist, and when nothing can be used.
    """
    found: list[tuple[Path, str]] = []
    for given in map(Path, paths):
        if not given.exists():
            raise UserError(f"{given}: does not exist, expected MIDI files or a folder of them")
        inside = find_files(given, (*SUFFIXES, IDS_SUFFIX)) if given.is_dir() else []
        if given.is_dir() and not inside:
            raise UserError(f"{given}: no MIDI file ({', '.join(SUFFIXES)}) and no {IDS_SUFFIX}, expected at least one")
        found += [(given / source, str(given / source)) for source in inside] or [(given, str(given))]
    music, skipped = [], []
    for i, (path, name) in enumerate(found):
        try:
            music.append(read_music(path, name, tokenizer))
        except UserError as error:
            skipped.append(Skipped(name, str(error)))
        if progress:
            progress(i + 1, len(found))
    if not music:
        raise UserError(f"{skipped[0].source}: {skipped[0].reason}; none of {len(skipped)} files can be used")
    return music, skipped


def is_corpus(path: str | os.PathLike) -> bool:
    """Whether a folder is a prepared corpus."""
    return (Path(path) / INDEX).is_file()


def tokenizer_of(reference: str | os.PathLike | None) -> Tokenizer:
    """What ids mean beside a reference: its own tokenizer if it is a corpus, else the performance events.

    Raises UserError for a corpus whose tokenizer knows no notes.
    """
    if reference is None or not is_corpus(reference):
        return PerformanceTokenizer()
    tokenizer = Corpus.load(reference).tokenizer
    if tokenizer.no_notes is not None:
        raise UserError(f"{reference}: {tokenizer.no_notes}")
    return tokenizer


@dataclass(frozen=True)
class Source:
    """A piece of a reference, yet to be read. origin: the work, equal for several performances of it if known."""

    name: str
    origin: str
    notes: Callable[[], Notes]


def reference_sources(path: Path, split: str | None, option: str = "--reference") -> tuple[list[Source], str]:
    """The pieces of a split of a corpus (default validation), or the MIDI files in a folder; and what they are called.

    Raises UserError, which names the option, for what is neither, and for a split that it has not.
    """
    if is_corpus(path):
        corpus, split = Corpus.load(path), split or "validation"
        pieces = corpus.pieces(split)
        origins = [": ".join(piece.work) for piece in pieces]
        reads = [partial(lambda p: corpus.tokenizer.decode(corpus.tokens(p)), p) for p in pieces]
        sources = [Source(p.source, origin, read) for p, origin, read in zip(pieces, origins, reads, strict=True)]
        return sources, f"{split} pieces of {path}"
    if split is not None:
        raise UserError(f"--split {split}: {path} is no prepared corpus, it has no splits")
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{option} {path}: {found}, expected a corpus or a folder of MIDI files")
    names = find_files(path, SUFFIXES)
    if not names:
        raise UserError(f"{option} {path}: no corpus and no MIDI file ({', '.join(SUFFIXES)}) in it, expected either")
    return [Source(n, n, partial(lambda n: read_notes(read_bytes(path / n)), n)) for n in names], f"files in {path}"


def read_reference(
    path: str | os.PathLike,
    lengths: Sequence[float],
    *,
    split: str | None = None,
    excerpts: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> Reference:
    """At most so many excerpts of a split of a corpus (default validation), or of a folder of MIDI files.

    Pieces come in a random order, each with as many excerpts, at least one, none overlapping. The
    excerpts of a piece are as long as one of `lengths` (seconds), drawn at random; a piece that is shorter is one
    excerpt. What sounds at the beginning of an excerpt is left out, and what sounds at its end is cut. The same seed
    gives the same excerpts.

    Raises UserError as `reference_sources`, and when nothing can be used.
    """
    for option, value, least in (("--excerpts", excerpts, 1), ("--seed", seed, 0)):
        if value < least:
            raise UserError(f"{option} {value}: expected at least {least}")
    sources, kind = reference_sources(Path(path), split)
    rng, each = np.random.default_rng(seed), max(excerpts // len(sources), 1)
    music: list[Music] = []
    skipped: list[Skipped] = []
    shorter = pieces = 0
    for i in rng.permutation(len(sources)):
        source, length = sources[i], float(rng.choice(lengths))
        try:
            notes = source.notes()
        except UserError as error:
            skipped.append(Skipped(source.name, str(error)))
            continue
        parts = [Music.of(source.name, part, source.origin) for part in cut_excerpts(notes, length, each, rng)]
        cut = [part for part in parts if len(part.notes)][: excerpts - len(music)]  # what is drums alone has none left
        music += cut
        pieces, shorter = pieces + bool(cut), shorter + (bool(cut) and notes.duration < length)
        if progress:
            progress(len(music), excerpts)
        if len(music) == excerpts:
            break
    if not music:
        raise UserError(f"--reference {path}: no notes in any of {len(sources)} {kind}, expected music")
    return Reference(music, pieces, shorter, kind, skipped)


def cut_excerpts(notes: Notes, seconds: float, most: int, rng: np.random.Generator) -> list[Notes]:
    """At most so many excerpts of a piece, in order and not overlapping, at random places; those without a note are
    left out."""
    slots = max(int(notes.duration // seconds), 1)
    chosen = np.sort(rng.permutation(slots)[:most])
    starts = rng.uniform(0, max(notes.duration - slots * seconds, 0.0)) + chosen * seconds
    cut = [excerpt(notes, float(start), seconds) for start in starts]
    return [part for part in cut if len(part)]
