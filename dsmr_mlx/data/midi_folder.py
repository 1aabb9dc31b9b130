"""Find the MIDI files of a folder, and assign them to splits.

In MAESTRO's layout, a `maestro-v*.csv`, a `maestro-v*.json` or a `metadata.csv` with MAESTRO's columns names the files
and their splits. Any other folder is searched for MIDI files, which are split by file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.paths import MIDI_SUFFIXES
from dsmr_mlx.data.corpus import SPLITS, Skipped

COLUMNS = ("canonical_composer", "canonical_title", "split", "midi_filename")


@dataclass(frozen=True)
class Entry:
    """A file to be prepared. source: its path relative to the folder; split: empty if not assigned yet."""

    source: str
    split: str = ""
    composer: str = ""
    title: str = ""


def choose_splits(sources: Sequence[str], validation_fraction: float, seed: int) -> dict[str, str]:
    """Return the split of each file: `validation_fraction` of them, at least one of two or more, for validation.

    Files are ranked by a hash of the seed and their name. The choice does not depend on their order or the folder's
    path, and adding a file moves few of the others.
    """
    count = round(validation_fraction * len(sources))
    if validation_fraction > 0:
        count = min(max(count, 1), len(sources) - 1)
    ranked = sorted(sources, key=lambda source: hashlib.sha256(os.fsencode(f"{seed}:{source}")).digest())
    return {source: "validation" if rank < count else "train" for rank, source in enumerate(ranked)}


def discover_files(midi_dir: Path) -> tuple[list[Entry], list[Skipped], str | None]:
    """Return the files to prepare, those left out already, and the name of the metadata file or None.

    Raises `UserError` if there is no MIDI file, or the metadata is invalid.
    """
    found = find_files(midi_dir, MIDI_SUFFIXES)
    metadata = _metadata_file(midi_dir)
    if metadata is None:
        if not found:
            raise UserError(f"{midi_dir}: no MIDI file ({', '.join(MIDI_SUFFIXES)}), expected at least one")
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


def find_files(root: Path, suffixes: Sequence[str]) -> list[str]:
    """Return the files under a folder with one of these suffixes, as sorted relative paths.

    Links are followed; hidden files and folders are left out. Raises `UserError` for a folder that cannot be read.
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
    return sorted(found)


def _refuse_folder(error: OSError) -> None:
    """Raise a `UserError`; by default `os.walk` skips unreadable folders silently."""
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _stays_inside(source: str) -> bool:
    return not Path(source).is_absolute() and ".." not in Path(source).parts


def _metadata_file(midi_dir: Path) -> str | None:
    """Return the name of the metadata file, or None for a plain folder.

    MAESTRO has the same table as .csv and .json; the .csv is used. A metadata.csv without MAESTRO's columns is ignored.
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
    """Return the columns and rows of a .csv, or of MAESTRO's column-oriented .json ({column: {"0": value, …}})."""
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
    """Return the rows of MAESTRO's table. Raises `UserError`, which names the file, the row and the invalid field."""
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
    """Raise `UserError` if a composition is in two splits: models would be tested on music from their training set."""
    seen: dict[tuple[str, str], str] = {}
    for entry in entries:
        split = seen.setdefault((entry.composer, entry.title), entry.split)
        if split != entry.split:
            raise UserError(
                f"{path}: {entry.composer}, {entry.title} is in the splits {split} and {entry.split}, "
                "expected every composition in one split"
            )
