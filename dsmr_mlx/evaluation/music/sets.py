"""Read the music to assess: files of notes or ids, and excerpts of real music of the same lengths.

All notes are rounded to the 10 ms grid of the performance events, so that a MIDI file, a stream of ids and a piece of a
corpus with the same notes have the same features.
"""

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import read_regular
from dsmr_mlx.common.paths import MIDI_SUFFIXES
from dsmr_mlx.data.corpus import INDEX, Corpus, Piece, Skipped
from dsmr_mlx.data.midi_folder import find_files
from dsmr_mlx.evaluation.losses import Progress
from dsmr_mlx.music.midi import READ_LIMITS, read_bytes, read_midi
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.repairs import warn_of_repairs
from dsmr_mlx.music.summary import excerpt
from dsmr_mlx.tokenizers import performance
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer

IDS_SUFFIX = ".npy"  # written by training if no MIDI library is installed


@dataclass(frozen=True, eq=False)
class Music:
    """One file or excerpt.

    notes: on the grid, the first at 0 s; ids: their canonical performance events `(T,)` without specials; origin: the
    work that it is from; stored: the ids `(T,)` in the file, None for MIDI files.
    """

    name: str
    notes: Notes
    ids: np.ndarray
    origin: str = ""
    stored: np.ndarray | None = None

    @classmethod
    def of(cls, name: str, notes: Notes, origin: str = "", stored: np.ndarray | None = None) -> "Music":
        """Round notes to the grid; the default origin is the name."""
        ids = performance.encode_notes(notes)
        return cls(name, performance.decode_ids(ids), ids, origin or name, stored)


@dataclass(frozen=True, eq=False)
class Reference:
    """Excerpts of real music.

    pieces: number of pieces that they are from; shorter: number of these that are shorter than an excerpt should be;
    kind: a description of the pieces; skipped: unusable files.
    """

    music: list[Music]
    pieces: int
    shorter: int
    kind: str
    skipped: list[Skipped]


def read_ids(path: Path) -> np.ndarray:
    """Read the ids `(T,)` of a .npy file. Raises `UserError`, without the path, for anything else."""
    try:
        ids = np.load(io.BytesIO(read_regular(path)), allow_pickle=False)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})") from error
    except Exception as error:  # NumPy parses a damaged header as Python, which can raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"not a NumPy file of ids ({reason})") from error
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.ndim != 1:
        found = f"{ids.ndim}-d {ids.dtype}" if isinstance(ids, np.ndarray) else "an archive"
        raise UserError(f"{found}, expected 1-d integers")
    return ids


def read_named(path: Path, name: str) -> Notes:
    """Read the notes of a MIDI file. Raises `UserError` without the path; warns of repairs with the name."""
    notes, repairs = read_midi(read_bytes(path))
    warn_of_repairs(name, repairs)
    return notes


def read_music(path: Path, name: str, tokenizer: Tokenizer) -> Music:
    """Read a MIDI file or a .npy file of ids. Raises `UserError`, without the path, if invalid or without notes."""
    if path.suffix.lower() != IDS_SUFFIX:
        return Music.of(name, read_named(path, name))
    ids = read_ids(path)
    notes = tokenizer.decode(ids)
    if notes.duration > READ_LIMITS.seconds:
        raise UserError(f"{notes.duration:.0f} s long, expected at most {READ_LIMITS.seconds:.0f} s")
    music = Music.of(name, notes, stored=ids)
    if not len(music.notes):
        raise UserError("no notes but drums" if len(notes) else "no notes")
    return music


def read_files(
    paths: Sequence[str | os.PathLike], tokenizer: Tokenizer, progress: Progress | None = None
) -> tuple[list[Music], list[Skipped]]:
    """Read MIDI files, .npy files of ids, and folders of them, in order; return the music and the skipped files.

    Raises `UserError` if a path does not exist, a folder has no such file, or no file can be used.
    """
    found: list[tuple[Path, str]] = []
    for given in map(Path, paths):
        if not given.exists():
            raise UserError(f"{given}: does not exist, expected MIDI files or a folder of them")
        inside = find_files(given, (*MIDI_SUFFIXES, IDS_SUFFIX)) if given.is_dir() else []
        if given.is_dir() and not inside:
            suffixes = ", ".join(MIDI_SUFFIXES)
            raise UserError(f"{given}: no MIDI file ({suffixes}) and no {IDS_SUFFIX}, expected at least one")
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
    """Return whether a folder is a prepared corpus."""
    return (Path(path) / INDEX).is_file()


def reference_tokenizer(reference: str | os.PathLike | None) -> Tokenizer:
    """Return the tokenizer of the reference if it is a corpus, else that of the performance events.

    Raises `UserError` if the tokenizer of the corpus cannot decode notes.
    """
    if reference is None or not is_corpus(reference):
        return PerformanceTokenizer()
    tokenizer = Corpus.load(reference).tokenizer
    if not tokenizer.decodes:
        raise UserError(f"{reference}: {tokenizer.why_not}")
    return tokenizer


@dataclass(frozen=True)
class ReferencePiece:
    """A piece of real music that has not been read yet.

    origin: the work, equal for several performances of it if known; read: reads the notes, may raise `UserError`.
    """

    name: str
    origin: str
    read: Callable[[], Notes]


def find_pieces(path: Path, split: str | None, argument: str) -> tuple[list[ReferencePiece], str]:
    """Find the pieces of a split of a corpus (default validation) or the MIDI files in a folder, and describe them.

    argument: the name of `path` in the `UserError` that is raised if it is neither; an unknown split raises it too.
    """
    if is_corpus(path):
        corpus, split = Corpus.load(path), split or "validation"

        def decode(piece: Piece) -> Notes:
            return corpus.tokenizer.decode(corpus.tokens(piece))

        found = [ReferencePiece(p.source, ": ".join(p.work), partial(decode, p)) for p in corpus.pieces(split)]
        return found, f"{split} pieces of {path}"
    if split is not None:
        raise UserError(f"`split` {split}: {path} is not a prepared corpus and has no splits")
    if not path.is_dir():
        state = "is a file" if path.exists() else "does not exist"
        raise UserError(f"`{argument}` {path}: {state}, expected a corpus or a folder of MIDI files")
    names = find_files(path, MIDI_SUFFIXES)
    if not names:
        suffixes = ", ".join(MIDI_SUFFIXES)
        raise UserError(f"`{argument}` {path}: neither a corpus nor a folder with MIDI files ({suffixes})")

    def read(name: str) -> Notes:
        return read_named(path / name, name)

    return [ReferencePiece(name, name, partial(read, name)) for name in names], f"files in {path}"


def read_reference(
    path: str | os.PathLike,
    lengths: Sequence[float],
    *,
    split: str | None = None,
    excerpts: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> Reference:
    """Cut at most `excerpts` excerpts from a split of a corpus (default validation) or a folder of MIDI files.

    Pieces are taken in random order; the excerpts still missing are spread evenly over the pieces left, without
    overlaps. The excerpts of a piece have one of `lengths` in seconds, drawn at random; a shorter piece is one excerpt.
    Notes that begin before an excerpt are left out, notes that sound at its end are cut. The same seed gives the same
    excerpts.

    Raises `UserError` as `find_pieces` does, for invalid numbers, and if no piece can be used.
    """
    for name, value, minimum in (("excerpts", excerpts, 1), ("seed", seed, 0)):
        if value < minimum:
            raise UserError(f"`{name}` {value}: expected at least {minimum}")
    sources, kind = find_pieces(Path(path), split, "reference")
    rng = np.random.default_rng(seed)
    music: list[Music] = []
    skipped: list[Skipped] = []
    shorter = pieces = 0
    for tried, i in enumerate(rng.permutation(len(sources))):
        source, length = sources[i], float(rng.choice(lengths))
        try:
            notes = source.read()
        except UserError as error:
            skipped.append(Skipped(source.name, str(error)))
            continue
        each = -(-(excerpts - len(music)) // (len(sources) - tried))  # rounded up
        parts = [Music.of(source.name, part, source.origin) for part in cut_excerpts(notes, length, each, rng)]
        cut = [part for part in parts if len(part.notes)]  # drums alone leave no notes
        music += cut
        pieces, shorter = pieces + bool(cut), shorter + (bool(cut) and notes.duration < length)
        if progress:
            progress(len(music), excerpts)
        if len(music) == excerpts:
            break
    if not music:
        raise UserError(f"`reference` {path}: no notes in any of {len(sources)} {kind}")
    return Reference(music, pieces, shorter, kind, skipped)


def cut_excerpts(notes: Notes, seconds: float, n: int, rng: np.random.Generator) -> list[Notes]:
    """Cut at most n excerpts of `seconds` from random places of a piece, in order, without overlaps or empty ones."""
    slots = max(int(notes.duration // seconds), 1)
    chosen = np.sort(rng.permutation(slots)[:n])
    starts = rng.uniform(0, max(notes.duration - slots * seconds, 0.0)) + chosen * seconds
    cut = [excerpt(notes, float(start), seconds) for start in starts]
    return [part for part in cut if len(part)]
