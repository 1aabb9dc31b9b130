"""Music of several instruments: read with its programs, written on separate tracks, or merged into one piano."""

import numpy as np
import pytest
from support.bands import BASS, STRINGS, band, random_band
from support.midi_files import midi, note, track
from symusic import Score

from dsmr_mlx.data.augmentation import Draw
from dsmr_mlx.music.midi import midi_bytes, read_notes
from dsmr_mlx.music.notes import DRUMS, Notes
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer


def columns(notes: Notes) -> np.ndarray:
    """Return the notes as an array `(5, N)`."""
    return np.stack([notes.onset, notes.offset, notes.pitch, notes.velocity, notes.program])


def test_programs_stay_separate_with_a_pedal_each():
    notes = read_notes(band(), programs=True)
    assert notes.programs == [0, BASS, DRUMS]
    assert columns(notes).T.tolist() == [
        [0.0, 0.9, 60, 80, 0],
        [0.0, 0.2, 60, 90, BASS],  # until the other bass plays the same pitch
        [0.1, 0.12, 60, 100, DRUMS],
        [0.2, 0.6, 60, 91, BASS],
        [0.3, 0.32, 42, 101, DRUMS],
    ]


def test_without_programs_all_notes_are_one_piano():
    notes = read_notes(band())
    assert notes.program is None
    assert notes.programs == [0]
    assert notes == read_notes(band(), programs=True).as_piano()
    assert notes.onset.tolist() == [0.0, 0.2]


@pytest.mark.parametrize("seed", range(4))
def test_written_files_are_read_back_with_drums_on_channel_10(seed):
    notes = random_band(seed)
    data = midi_bytes(notes, "text")
    assert np.allclose(columns(read_notes(data, programs=True)), columns(notes), rtol=0, atol=1e-9)
    assert midi_bytes(notes, "text") == data
    tracks = Score.from_midi(data).tracks
    assert [(t.program, t.is_drum) for t in tracks] == [(0, False), (BASS, False), (STRINGS, False), (0, True)]
    assert bytes([0x99]) in data


def test_drums_alone_are_music_only_with_programs():
    drums = midi(track(note(0, 20, 36, 100, 9), note(100, 20, 38, 100, 9)))
    assert len(read_notes(drums, programs=True)) == 2
    with pytest.raises(ValueError, match="no pitched note"):
        read_notes(drums)
    with pytest.raises(ValueError, match="no note, expected"):
        read_notes(midi(track((0, b"\xc0\x00"))), programs=True)


def test_the_performance_vocabulary_encodes_one_piano_without_drums():
    notes, tokenizer = random_band(1), PerformanceTokenizer()
    assert np.array_equal(tokenizer.encode_notes(notes), tokenizer.encode_notes(notes.as_piano()))
    assert (notes.as_piano().program, (notes.program == DRUMS).any()) == (None, True)
    only_drums = notes.take(notes.program == DRUMS)
    assert tokenizer.encode_notes(only_drums).tolist() == [1, 2]


def test_augmentation_keeps_programs_and_drum_pitches():
    notes = random_band(2)
    changed = Draw(semitones=3, factor=1.05, velocity=5).apply(notes)
    is_drum = notes.program == DRUMS
    assert np.array_equal(changed.program, notes.program)
    assert np.array_equal(changed.pitch.astype(int) - notes.pitch, np.where(is_drum, 0, 3))
    assert np.allclose(changed.onset, notes.onset * 1.05)


def test_columns_must_have_one_length():
    with pytest.raises(ValueError, match=r"arrays of lengths \[1, 2\], expected one length"):
        Notes([0.0], [1.0], [60], [64], [0, 0])
    assert Notes([0.0], [1.0], [60], [64]) != Notes([0.0], [1.0], [60], [64], [0])
    assert Notes([0.0], [1.0], [60], [64], [1]) != Notes([0.0], [1.0], [60], [64], [0])
