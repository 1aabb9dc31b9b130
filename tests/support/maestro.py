"""Small folders in the layout of MAESTRO v1, v2 and v3: one table as .csv and .json, MIDI files in folders of years."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from support.midi_files import tune, write_midi_files

COLUMNS = ["canonical_composer", "canonical_title", "split", "year", "midi_filename", "audio_filename", "duration"]
ROWS = [  # composer, title, split, file
    ("Bach", "Fugue, in C", "train", "2004/a.midi"),
    ("Bach", "Fugue, in C", "train", "2004/b.midi"),
    ("Liszt", "Étude", "test", "2006/c.midi"),
    ("Liszt", 'Ballade "2"', "validation", "2006/d.midi"),
]
Row = tuple[str, str, str, str]


def _records(rows: list[Row]) -> list[dict]:
    return [dict(zip(COLUMNS, (c, t, s, 2004, f, f"{f}.wav", 1.5), strict=True)) for c, t, s, f in rows]


def csv_table(rows: list[Row], columns: list[str] = COLUMNS) -> bytes:
    """Return MAESTRO's .csv, the same in all versions, or some of its columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(_records(rows))
    return text.getvalue().encode()


def json_rows(rows: list[Row]) -> bytes:
    """Return the .json of MAESTRO v1 and v2: a list of rows."""
    return json.dumps(_records(rows)).encode()


def json_columns(rows: list[Row]) -> bytes:
    """Return the .json of MAESTRO v3: {column: {"0": value, …}}."""
    return json.dumps(
        {column: {str(i): row[column] for i, row in enumerate(_records(rows))} for column in COLUMNS}
    ).encode()


def write_maestro(folder: Path, rows: list[Row] = ROWS, tables: dict[str, bytes] | None = None) -> Path:
    """Write a folder with a piece for each row; tables: by name, default `maestro-v3.0.0.csv`."""
    tables = {"maestro-v3.0.0.csv": csv_table(rows)} if tables is None else tables
    return write_midi_files(folder, {row[3]: tune(seed) for seed, row in enumerate(rows)} | tables)
