from pathlib import Path

import pytest

from dsmr_mlx.music.midi import write_notes
from dsmr_mlx.music.notes import Notes


@pytest.fixture
def phrase(tmp_path) -> Path:
    """Write a MIDI file of three notes."""
    path = tmp_path / "phrase.mid"
    write_notes(Notes([0, 0.2, 0.4], [0.2, 0.4, 0.7], [60, 64, 67], [60, 70, 80]), path)
    return path
