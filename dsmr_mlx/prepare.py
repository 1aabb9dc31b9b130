"""A folder of MIDI files → a corpus.

MAESTRO's layout is read as it is: a `maestro-v*.csv`, a `maestro-v*.json` or a `metadata.csv` with MAESTRO's
columns names the files and their splits. Any other folder is searched for MIDI files and split by file. In
both cases every file ends up either in the corpus or among the skipped, with the reason.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from dsmr_mlx.corpus import INDEX, SPLITS, Corpus, CorpusWriter, Skipped, count_by_split, token_hash
from dsmr_mlx.errors import UserError
from dsmr_mlx.midi import read_bytes, read_notes
from dsmr_mlx.tokenizer import PerformanceTokenizer, Tokenizer

SUFFIXES = (".mid", ".midi", ".kar", ".rmi")
COLUMNS = ("canonical_composer", "canonical_title", "split", "midi_filename")
CHUNK = 32  # files that a worker process is given at a time
POOL_FROM = 4000  # files: below, one process is done before others have started (500 files a second)

Progress = Callable[[int, int], None]  # files done, files in all


@dataclass(frozen=True)
class Entry:
    """A file to be prepared. source: its path relative to the folder; split: empty when yet to be decided."""

    source: str
    split: str = ""
    composer: str = ""
    title: str = ""


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did.

    out: the corpus; up_to_date: it was there already, made from the same input; pieces: how many per split;
    tokens, notes, seconds: in all pieces together (seconds of music); skipped: the files left out;
    wall_seconds: the time that it took.
    """

    out: Path
    up_to_date: bool
    pieces: dict[str, int]
    tokens: int
    notes: int
    seconds: float
    skipped: list[Skipped] = field(default_factory=list)
    wall_seconds: float = 0.0


def prepare(
    midi_dir: str | os.PathLike,
    out: str | os.PathLike,
    *,
    tokenizer: Tokenizer | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> PrepareReport:
    """Tokenize the MIDI files under `midi_dir` into a corpus at `out`. The same input gives the same corpus.

    tokenizer: `PerformanceTokenizer()` unless given. validation_fraction, in [0, 1), and seed: how many of
    the files, and which, are kept for validation (at least one of two files or more); a layout that brings
    its own splits ignores both. workers: processes, by default 1, or one per core for thousands of files; a
    script that asks for several needs the `if __name__ == "__main__"` guard of `multiprocessing`. progress:
    called after each file.

    If `out` is a corpus made from the same input, nothing is done. Another corpus there is an error, or
    replaced with `force`; what is not a corpus is never replaced. The input is identified by the content of
    its files and not by their dates, so that a copied or touched data set is still the same one, and an
    edited one never is; reading a thousand files costs a fraction of a second.

    Raises UserError for a missing folder, a folder without usable MIDI, unfit options, metadata that is
    incomplete or has one composition in two splits, and an `out` that is taken or cannot be written.
    """
    began, midi_dir, out = time.perf_counter(), Path(midi_dir), Path(out)
    tokenizer = tokenizer or PerformanceTokenizer()
    _check_options(midi_dir, out, validation_fraction, workers)
    entries, skipped, metadata = _discover(midi_dir)
    options = {} if metadata else {"validation_fraction": validation_fraction, "seed": seed}
    origin = {
        "folder": str(midi_dir.resolve()),
        "metadata": metadata,
        "options": options,
        "fingerprint": _input_fingerprint(midi_dir, entries, skipped, metadata, options, tokenizer),
    }
    if existing := _existing_corpus(out, origin["fingerprint"], force):
        return _report(existing, True, began)
    try:
        with CorpusWriter(out, tokenizer) as writer:
            writer.skipped += skipped
            _write_pieces(writer, midi_dir, entries, workers, progress)
            if options:
                writer.assign_splits(choose_splits([piece.source for piece in writer.pieces], **options))
            writer.commit(origin)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    return _report(Corpus.load(out), False, began)


def choose_splits(sources: Sequence[str], validation_fraction: float, seed: int) -> dict[str, str]:
    """A split for every file: `validation_fraction` of them, at least one of two or more, for validation.

    Files are ranked by a hash of the seed and their name, so that the choice depends on neither the order nor
    the place of the folder, and adding a file moves few of the others.
    """
    count = round(validation_fraction * len(sources))
    if validation_fraction > 0:
        count = min(max(count, 1), len(sources) - 1)
    ranked = sorted(sources, key=lambda source: hashlib.sha256(os.fsencode(f"{seed}:{source}")).digest())
    return {source: "validation" if rank < count else "train" for rank, source in enumerate(ranked)}


def _check_options(midi_dir: Path, out: Path, validation_fraction: float, workers: int | None) -> None:
    if not midi_dir.is_dir():
        found = "is a file" if midi_dir.exists() else "does not exist"
        raise UserError(f"{midi_dir}: {found}, expected a folder of MIDI files")
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction: {validation_fraction}, expected at least 0 and below 1")
    if workers is not None and workers < 1:
        raise UserError(f"workers: {workers}, expected at least 1")
    if midi_dir.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out}: holds the MIDI files of {midi_dir}, expected another place for the corpus")


def _existing_corpus(out: Path, fingerprint: str, force: bool) -> Corpus | None:
    """The corpus at `out` if it comes from the same input, None if `out` is free or may be replaced.

    Raises UserError when it is taken by anything else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / INDEX).is_file():
        raise UserError(f"{out}: exists and is not a corpus, expected a new folder or a corpus")
    if force:
        return None
    try:
        corpus = Corpus.load(out)
    except UserError as error:
        raise UserError(f"{error}; --force replaces the corpus") from error
    found = corpus.origin.get("fingerprint")
    if found != fingerprint:
        raise UserError(
            f"{out}: a corpus of other input or options (fingerprint {found}, expected {fingerprint}); "
            "--force replaces it"
        )
    return corpus


def _report(corpus: Corpus, up_to_date: bool, began: float) -> PrepareReport:
    pieces = corpus.pieces()
    return PrepareReport(
        out=corpus.path,
        up_to_date=up_to_date,
        pieces=count_by_split(pieces),
        tokens=corpus.n_tokens,
        notes=sum(piece.notes for piece in pieces),
        seconds=sum(piece.duration for piece in pieces),
        skipped=corpus.skipped,
        wall_seconds=time.perf_counter() - began,
    )


def _discover(midi_dir: Path) -> tuple[list[Entry], list[Skipped], str | None]:
    """The files to prepare, those left out at sight, and the name of the metadata file, if there is one."""
    found = _midi_files(midi_dir)
    metadata = _metadata_file(midi_dir)
    if metadata is None:
        if not found:
            raise UserError(f"{midi_dir}: no MIDI file ({', '.join(SUFFIXES)}), expected at least one")
        return [Entry(source, title=Path(source).stem) for source in found], [], None
    entries = _maestro_entries(midi_dir / metadata)
    _check_leakage(midi_dir / metadata, entries)
    named, skipped = {}, []
    for entry in entries:
        if entry.source in named:
            skipped.append(Skipped(entry.source, f"named twice in {metadata}"))
        elif not _stays_inside(entry.source):
            skipped.append(Skipped(entry.source, "outside the folder"))
        elif not (midi_dir / entry.source).is_file():
            skipped.append(Skipped(entry.source, f"named in {metadata}, but there is no such file"))
        else:
            named[entry.source] = entry
    skipped += [Skipped(source, f"not in {metadata}") for source in found if source not in named]
    return list(named.values()), skipped, metadata


def _midi_files(midi_dir: Path) -> list[str]:
    """MIDI files under a folder, as sorted relative paths; links are followed, hidden files and folders left out."""
    found, seen = [], set()
    for folder, folders, files in os.walk(midi_dir, onerror=_refuse_folder, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            (Path(folder) / name).relative_to(midi_dir).as_posix()
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def _refuse_folder(error: OSError) -> None:
    """`os.walk` would pass over a folder that it cannot read, and its files would be missing unnoticed."""
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _stays_inside(source: str) -> bool:
    return not Path(source).is_absolute() and ".." not in Path(source).parts


def _metadata_file(midi_dir: Path) -> str | None:
    """The metadata file's name, None for a plain folder.

    MAESTRO ships the same table as .csv and .json; the .csv is taken. A metadata.csv without MAESTRO's
    columns is someone else's and makes the folder a plain one.
    """
    for suffix in ("csv", "json"):
        names = sorted(path.name for path in midi_dir.glob(f"maestro-v*.{suffix}"))
        if len(names) > 1:
            raise UserError(f"{midi_dir}: {' and '.join(names)}, expected one version of MAESTRO")
        if names:
            return names[0]
    path = midi_dir / "metadata.csv"
    if path.is_file() and not _missing_columns(_read_table(path)[0]):
        return path.name
    return None


def _missing_columns(columns: Sequence[str]) -> list[str]:
    return [column for column in COLUMNS if column not in columns]


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a .csv, or of MAESTRO's column-oriented .json ({column: {"0": value, …}})."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            reader = csv.DictReader(io.StringIO(text, newline=""))
            return list(reader.fieldnames or []), list(reader)
        table = json.loads(text)
        columns = [column for column in COLUMNS if column in table]
        keys = table[columns[0]].keys() if columns else []
        return columns, [{column: table[column][key] for column in columns} for key in keys]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError, AttributeError, KeyError, csv.Error) as error:
        raise UserError(f"{path}: not a table in MAESTRO's form ({type(error).__name__}: {error})") from error


def _maestro_entries(path: Path) -> list[Entry]:
    """The rows of MAESTRO's table; UserError naming the file, the row and the field that is wrong."""
    columns, rows = _read_table(path)
    missing = _missing_columns(columns)
    if missing:
        raise UserError(f"{path}: columns {', '.join(missing)} are missing, expected MAESTRO's columns")
    entries = []
    for number, row in enumerate(rows, start=1):
        composer, title, split, source = (str(row[column] or "").strip() for column in COLUMNS)
        if split not in SPLITS:
            raise UserError(f"{path}: row {number} has split {split!r}, expected one of {', '.join(SPLITS)}")
        if not source:
            raise UserError(f"{path}: row {number} has an empty midi_filename, expected a path")
        entries.append(Entry(source, split, composer, title))
    return entries


def _check_leakage(path: Path, entries: list[Entry]) -> None:
    """No composition may be in two splits: a model would be tested on music that it was trained on."""
    seen: dict[tuple[str, str], str] = {}
    for entry in entries:
        split = seen.setdefault((entry.composer, entry.title), entry.split)
        if split != entry.split:
            raise UserError(
                f"{path}: {entry.composer}, {entry.title} is in the splits {split} and {entry.split}, "
                "expected every composition in one split"
            )


def _input_fingerprint(
    midi_dir: Path,
    entries: list[Entry],
    skipped: list[Skipped],
    metadata: str | None,
    options: dict[str, Any],
    tokenizer: Tokenizer,
) -> str:
    """sha256, in hex, of all that decides what the corpus will be."""
    digest = hashlib.sha256()
    plan = [
        metadata,
        options,
        tokenizer.fingerprint,
        [(entry.source, entry.split, entry.composer, entry.title) for entry in entries],
        [(entry.source, entry.reason) for entry in skipped],
    ]
    digest.update(json.dumps(plan, sort_keys=True).encode())
    for entry in entries:
        try:
            content = read_bytes(midi_dir / entry.source)
        except UserError as error:
            content = str(error).encode()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class Encoded:
    """One file's tokens; or, when ids is None, the reason why it has none."""

    ids: np.ndarray | None
    duration: float = 0.0
    notes: int = 0
    reason: str = ""


def _write_pieces(
    writer: CorpusWriter, midi_dir: Path, entries: list[Entry], workers: int | None, progress: Progress | None
) -> None:
    """Encode the files and append them in order; a file with the tokens of an earlier one is skipped.

    Raises UserError when not a single one can be used.
    """
    known: dict[str, str] = {}
    results = _encode_all([midi_dir / entry.source for entry in entries], writer.tokenizer, workers)
    for i, (entry, encoded) in enumerate(zip(entries, results, strict=True)):
        if encoded.ids is None:
            writer.skip(entry.source, encoded.reason)
        elif (content := token_hash(encoded.ids)) in known:
            writer.skip(entry.source, f"same music as {known[content]}")
        else:
            known[content] = entry.source
            writer.add(
                encoded.ids,
                source=entry.source,
                split=entry.split,
                composer=entry.composer,
                title=entry.title,
                duration=encoded.duration,
                notes=encoded.notes,
            )
        if progress:
            progress(i + 1, len(entries))
    if not writer.pieces:
        reasons = "; ".join(f"{entry.source}: {entry.reason}" for entry in writer.skipped[:3])
        raise UserError(f"{midi_dir}: none of {len(writer.skipped)} files can be used ({reasons})")


def _encode_all(paths: list[Path], tokenizer: Tokenizer, workers: int | None) -> Iterator[Encoded]:
    """Encode files in order, in this process or in several."""
    if workers is None:
        workers = (os.cpu_count() or 1) if len(paths) >= POOL_FROM else 1
    if workers == 1:
        return (_encode(path, tokenizer) for path in paths)
    return _encode_in_pool(paths, tokenizer, workers)


def _encode_in_pool(paths: list[Path], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    """Encode chunks of files in other processes. Few chunks are under way at a time, which bounds memory."""
    chunks = (paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK))
    pending: deque[Future[list[Encoded]]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        for chunk in islice(chunks, 2 * workers):
            pending.append(pool.submit(_encode_chunk, chunk, tokenizer))
        while pending:
            yield from pending.popleft().result()
            for chunk in islice(chunks, 1):
                pending.append(pool.submit(_encode_chunk, chunk, tokenizer))
    except BrokenExecutor as error:
        raise UserError(
            "workers: a process died while it encoded MIDI files, expected it to finish; try workers = 1"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encode_chunk(paths: list[Path], tokenizer: Tokenizer) -> list[Encoded]:
    return [_encode(path, tokenizer) for path in paths]


def _encode(path: Path, tokenizer: Tokenizer) -> Encoded:
    """One file's tokens, or why it has none."""
    try:
        notes = read_notes(read_bytes(path))  # from bytes, so that a reason does not repeat the path
    except UserError as error:
        return Encoded(None, reason=str(error))
    return Encoded(tokenizer.encode_notes(notes), notes.duration, len(notes))
