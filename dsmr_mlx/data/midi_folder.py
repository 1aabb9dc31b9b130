"""Find the MIDI files of a folder, and assign them to splits.

A table may name the files, their works and their splits: MAESTRO's `maestro-v*.csv` or `.json`, or a `metadata.csv`
with MAESTRO's or ASAP's columns. Its splits are *official* and taken as they are. Any other folder is searched for MIDI
files. Without official splits whole works are drawn for validation.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import posixpath
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import open_regular, read_text
from dsmr_mlx.common.parsing import parse_json
from dsmr_mlx.common.paths import MIDI_SUFFIXES, nfc
from dsmr_mlx.data.corpus import SPLITS, Skipped, count_by_split, work_key

# The column of each field: MAESTRO's name, then ASAP's.
COLUMNS = {
    "composer": ("canonical_composer", "composer"),
    "title": ("canonical_title", "title"),
    "source": ("midi_filename", "midi_performance"),
    "split": ("split",),
}
METADATA = "metadata.csv"
MAX_HEADER = 1 << 16  # bytes of the first line of a table


@dataclass(frozen=True)
class Entry:
    """A file to be prepared. source: its path relative to the folder; split: empty if not assigned yet."""

    source: str
    split: str = ""
    composer: str = ""
    title: str = ""


@dataclass(frozen=True)
class SharedWork:
    """A work with performances in several official splits. files: their number in each split."""

    composer: str
    title: str
    files: dict[str, int]

    def __str__(self) -> str:
        return f"{self.composer}, {self.title} ({', '.join(f'{n} {split}' for split, n in self.files.items())})"


@dataclass(frozen=True)
class MidiFolder:
    """The files of a folder.

    entries: files to prepare; skipped: files left out already; metadata: the name of the table, or None;
    unused: tables in subfolders, whose splits are ignored
    """

    entries: list[Entry]
    skipped: list[Skipped] = field(default_factory=list)
    metadata: str | None = None
    unused: list[str] = field(default_factory=list)

    @property
    def has_splits(self) -> bool:
        """Whether its splits are official."""
        return any(entry.split for entry in self.entries)

    @cached_property
    def shared_works(self) -> list[SharedWork]:
        """The works with performances in several official splits."""
        works: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
        for entry in self.entries:
            works[work_key(entry.composer, entry.title, entry.source)].append(entry)
        shared = [entries for entries in works.values() if len({entry.split for entry in entries}) > 1]
        return [SharedWork(entries[0].composer, entries[0].title, count_by_split(entries)) for entries in shared]


def choose_splits(works: Mapping[str, tuple[str, ...]], validation_fraction: float, seed: int) -> dict[str, str]:
    """Return the split of each file: whole works for validation, about `validation_fraction` of the files.

    works: the work of each file, see `corpus.work_key`. Of two or more works each split gets at least one, unless the
    fraction is 0. Works are ranked by a hash of the seed and their name, and taken in this order if they fit. The
    choice does not depend on the order of the files or the folder's path, and adding a file moves few of the others.
    """
    files: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for source, work in works.items():
        files[work].append(source)
    room = round(validation_fraction * len(works))
    if validation_fraction > 0:
        room = min(max(room, 1), len(works) - 1)
    ranked = sorted(files, key=lambda work: hashlib.sha256(os.fsencode(f"{seed}:" + "\n".join(work))).digest())
    chosen = set()
    for work in ranked:
        if len(files[work]) <= room:
            chosen.add(work)
            room -= len(files[work])
    if validation_fraction > 0 and not chosen and len(ranked) > 1:  # every work is larger than the fraction
        chosen.add(min(ranked, key=lambda work: len(files[work])))
    return {source: "validation" if work in chosen else "train" for source, work in works.items()}


def discover_files(midi_dir: Path) -> MidiFolder:
    """Return the files of a folder. Raises `UserError` if it has no MIDI file, or its table is invalid."""
    found = find_files(midi_dir, MIDI_SUFFIXES)
    metadata = _metadata_file(midi_dir)
    if metadata is None:
        if not found:
            raise UserError(f"{midi_dir}: no MIDI file ({', '.join(MIDI_SUFFIXES)}), expected at least one")
        unused = [path.relative_to(midi_dir).as_posix() for path in sorted(midi_dir.glob("*/maestro-v*.csv"))]
        return MidiFolder([Entry(source, title=Path(source).stem) for source in found], unused=unused)
    return _listed_files(midi_dir, metadata, found)


def _listed_files(midi_dir: Path, metadata: str, found: list[str]) -> MidiFolder:
    """Return the files that a table names. found: the MIDI files in the folder, as relative paths."""
    on_disk = {nfc(source): source for source in found}
    entries, named, skipped = {}, set(), []
    for entry in _read_entries(midi_dir / metadata):
        if not _stays_inside(entry.source):
            skipped.append(Skipped(entry.source, "outside the folder"))
            continue
        path = posixpath.normpath(entry.source)
        source = on_disk.get(nfc(path), path)
        named.add(source)
        if source in entries:
            skipped.append(Skipped(source, f"named twice in {metadata}"))
        elif not _exists(midi_dir / source):
            skipped.append(Skipped(source, f"named in {metadata}, but there is no such file"))
        else:
            entries[source] = replace(entry, source=source)
    skipped += [Skipped(source, f"not in {metadata}") for source in found if source not in named]
    return MidiFolder(list(entries.values()), skipped, metadata)


def find_files(root: Path, suffixes: Sequence[str]) -> list[str]:
    """Return the files under a folder with one of these suffixes, as sorted relative paths.

    Links are followed; hidden files and folders are left out. Raises `UserError` for an unreadable folder.
    """
    found, seen = [], set()
    for folder, folders, files in os.walk(root, onerror=_refuse_folder, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:  # a link back to a parent
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            (Path(folder) / name).relative_to(root).as_posix()
            for name in files
            if name.lower().endswith(tuple(suffixes)) and not name.startswith(".")
        ]
    return sorted(found, key=nfc)


def _refuse_folder(error: OSError) -> None:
    """Raise a `UserError`; by default `os.walk` skips unreadable folders silently."""
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _stays_inside(source: str) -> bool:
    return not Path(source).is_absolute() and ".." not in Path(source).parts


def _metadata_file(midi_dir: Path) -> str | None:
    """Return the name of the table, or None for a plain folder.

    MAESTRO has the same table as .csv and .json; the .csv is used. A metadata.csv with other columns is ignored.
    """
    for suffix in ("csv", "json"):
        names = sorted(path.name for path in midi_dir.glob(f"maestro-v*.{suffix}"))
        if len(names) > 1:
            raise UserError(f"{midi_dir}: {' and '.join(names)}, expected one version of MAESTRO")
        if names:
            return names[0]
    path = midi_dir / METADATA
    return path.name if path.is_file() and _is_ours(path) else None


def _is_ours(path: Path) -> bool:
    """Return whether a metadata.csv has known columns. Other programs write files in any encoding and format.

    Raises `UserError` if it cannot be read.
    """
    try:
        with open_regular(path) as file:
            header = file.readline(MAX_HEADER).decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        return not _missing(_csv_reader(header).fieldnames, "composer", "title", "source")
    except csv.Error:
        return False


def _exists(path: Path) -> bool:
    """Return whether a path is a file; False for names that the file system refuses."""
    try:
        return path.is_file()
    except OSError:
        return False


def _read_entries(path: Path) -> list[Entry]:
    """Return the rows of a table. Only a metadata.csv may be without splits.

    Raises `UserError`, which names the file, the row and the invalid field.
    """
    columns, rows = _read_rows(path)
    optional = {"split"} if path.name == METADATA else set()
    if missing := _missing(columns, *(key for key in COLUMNS if key not in optional)):
        found = f"found {', '.join(columns)}" if columns else "found none"
        expected = "those of MAESTRO or ASAP" if path.name == METADATA else "MAESTRO's columns"
        raise UserError(f"{path}: columns {', '.join(missing)} are missing, expected {expected} ({found})")
    if not rows:
        raise UserError(f"{path}: no rows, expected at least one")
    # Several columns can be known names of one field; the first counts.
    names = {key: name for key, known in COLUMNS.items() for name in reversed(known) if name in columns}
    entries = [Entry(**{key: str(row.get(name) or "").strip() for key, name in names.items()}) for row in rows]
    drawn = path.name == METADATA and not any(entry.split for entry in entries)
    for number, entry in enumerate(entries, start=1):
        if not drawn and entry.split not in SPLITS:
            raise UserError(f"{path}: row {number} has split {entry.split!r}, expected one of {', '.join(SPLITS)}")
        if not entry.source:
            raise UserError(f"{path}: row {number} has an empty {names['source']}, expected a path")
    return entries


def _missing(columns: Sequence[str], *keys: str) -> list[str]:
    """Return MAESTRO's names of the fields that a table does not have."""
    return [COLUMNS[key][0] for key in keys if not set(COLUMNS[key]) & set(columns)]


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and rows of a .csv or .json file. Raises `UserError` if it is not a table."""
    try:
        text = read_text(path)
        if path.suffix == ".csv":
            reader = _csv_reader(text)
            return list(reader.fieldnames), list(reader)
        rows = _json_rows(parse_json(text))
        return list(dict.fromkeys(name for row in rows for name in row)), rows
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError, AttributeError, KeyError, csv.Error) as error:
        raise UserError(f"{path}: not a table in MAESTRO's form ({type(error).__name__}: {error})") from error


def _csv_reader(text: str) -> csv.DictReader:
    """Return a reader of the rows of a .csv. There may be spaces around the commas."""
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    reader.fieldnames = [" ".join(name.split()) for name in reader.fieldnames or []]
    return reader


def _json_rows(table: list | dict) -> list[dict[str, str]]:
    """Return the rows of MAESTRO's .json: a list of rows (v1, v2), or {column: {"0": value, …}} (v3)."""
    if isinstance(table, list):
        return [dict(row.items()) for row in table]
    names = [name for known in COLUMNS.values() for name in known if name in table]
    keys = table[names[0]].keys() if names else []
    return [{name: table[name][key] for name in names} for key in keys]
